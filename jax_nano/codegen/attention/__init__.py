"""Attention in one pass, softmax(scale * Q K^T + bias, masked) V without the matrix of scores, and its gradients.

    composition         dtypes, instructions and tile of an attention, and what follows from them
    kernel              the generated functions, and all that is behind them
    loops               blocks of keys and values, packed, and tiles of queries
    few                 few queries: keys and values are read once and where they lie
    softmax             what is done to scores between the two products, and to sums behind them
    gradients           the five products of the gradients, for a block of keys and some rows
    gradient_weights    what is done between these
    products            a panel of rows against panels of B, by the matrix product's microkernels
    rows                what the caller's rows, masks and results want
    exponential         powers of two

Both products run through the same microkernel, that of the matrix product with the same instructions. The scores have
the logarithm of e to base 2 multiplied into their scale, so that weights are powers of two.
"""
