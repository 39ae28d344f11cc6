"""Products with quantised weights: y = x @ ((q - zero point) * scale), with q of 8 or 4 bits.

    formats      weights in memory as vectors of float32 or of pairs of bfloat16, the bit patterns
    rows         conversions of rows between dtypes
    columns      few rows of x; the weights' columns lie side by side: the loops around sweeps
    sweep        a few rows of weights, read from end to end
    inner        few rows of x; the weights lie along K: the loops around inner products
    inner_products    of a few columns, all of K
    dequantize   a block of weights as float32 or bfloat16, for products of many rows by the plain kernels
    finish       an epilogue of the sums, and their rounding; sums of bfloat16 blocks times their scales
    kernel       one generated function of all of these, and the list of such functions

A group of ``group`` values of K has a scale of its own in each column. Sums over a group are of ``x * (q - zero
point)``, in float32, where q and the zero point are integers and their difference is exact; a sum is multiplied by the
scale once, and added to those of the groups before. A sum is taken in an order that K, the group and the format decide
alone. With AVX512-BF16 there are formats for x of bfloat16 whose fields are pairs of bfloat16, of two values of K.
"""
