"""The model itself: found, checked, loaded, looked into, scored."""
