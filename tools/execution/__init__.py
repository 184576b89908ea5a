"""How a model is run over windows: whole, or block by block with its weights elsewhere.

Whatever measures or solves asks an `Execution` for windows and hidden states and does not know
which one runs. A model that is spread over several devices is run whole: its modules move what they
are given to where they are.
"""
