"""Optimal Brain Surgeon with a Kronecker-factored Fisher: SparseGPT's sweep, its outputs weighed.

The rise of the loss is taken as 1/2 * sum over the outputs i of D_i * e_i X^T X e_i^T / tokens, e_i
the change of row i of the weights and D_i the damped mean square of the loss gradient at that
output, as in the criterion `fisher` (K-FAC's factors, arXiv 1503.05671, the second one diagonal).
`fisher` keeps the diagonal of X^T X alone and leaves the other weights as they are; here the
weights that are left make up for what goes (Hassibi and Stork 1993), and what goes next is chosen
knowing that. SparseGPT (arXiv 2301.00774) does so with all D_i = 1.

The D_i say which rows give more; the update of a row is the same whatever its factor.
"""

from prunewright.tools.criteria import fisher

GROUP = fisher.GROUP
DAMPINGS = (0.1, 1.0)
"""As `sparsegpt.DAMPINGS`, from a stronger one on: what is left is fitted to little text."""
score = fisher.score
"""Stands in where the effect of a mask is predicted; the sweep finds lower ones."""
