"""Typed helpers over the MLIR bindings: the few words in which kernels are written.

A size, stride or offset is either a Python ``int`` (a constant of the kernel) or an :class:`I64` (an SSA
value, usually an argument). Arithmetic folds constants, so the same generator code yields a kernel that takes
a size as an argument or one that is specialised to it. Memory is reached through :class:`Ptr`, whose offsets
are in elements. Nothing here knows what a matrix product is.

    sizes      numbers of elements, steps and bytes, and comparisons of them
    types      MLIR's types by the names of dtypes
    constants  one operation for each value in a function
    vectors    arithmetic of scalars and vectors
    memory     addresses, loads and stores
    control    loops and branches
    module     functions and modules
"""

from __future__ import annotations

from .control import blocks as blocks
from .control import branches as branches
from .control import each as each
from .control import if_ as if_
from .control import keep_order as keep_order
from .control import loop as loop
from .control import range_ as range_
from .control import starts_of_blocks as starts_of_blocks
from .control import switch as switch
from .control import when as when
from .memory import Ptr as Ptr
from .memory import alloca as alloca
from .memory import select_ptr as select_ptr
from .module import Module as Module
from .module import new_module as new_module
from .sizes import I64 as I64
from .sizes import Size as Size
from .sizes import Value as Value
from .sizes import as_value as as_value
from .sizes import at_least as at_least
from .sizes import both as both
from .sizes import ceil_div as ceil_div
from .sizes import equal as equal
from .sizes import is_set as is_set
from .sizes import less as less
from .sizes import maximum as maximum
from .sizes import minimum as minimum
from .sizes import negate as negate
from .sizes import round_up as round_up
from .sizes import select_size as select_size
from .types import elem_bytes as elem_bytes
from .types import type_of as type_of
from .types import vec as vec
from .vectors import absolute as absolute
from .vectors import add_products_of_pairs as add_products_of_pairs
from .vectors import add_vectors as add_vectors
from .vectors import and_constant as and_constant
from .vectors import as_int32 as as_int32
from .vectors import bitcast as bitcast
from .vectors import bits_as as bits_as
from .vectors import call_intrinsic as call_intrinsic
from .vectors import compare as compare
from .vectors import constant_bytes as constant_bytes
from .vectors import constant_elements as constant_elements
from .vectors import constant_vector as constant_vector
from .vectors import convert as convert
from .vectors import divide as divide
from .vectors import equal_to as equal_to
from .vectors import exactly_bfloat16 as exactly_bfloat16
from .vectors import except_lanes as except_lanes
from .vectors import exponent_of_low_bits as exponent_of_low_bits
from .vectors import extract as extract
from .vectors import fma as fma
from .vectors import halves_of_power_of_two as halves_of_power_of_two
from .vectors import int32_to_float32 as int32_to_float32
from .vectors import lane_mask as lane_mask
from .vectors import lanes_of as lanes_of
from .vectors import like as like
from .vectors import minus as minus
from .vectors import multiply as multiply
from .vectors import multiply_add as multiply_add
from .vectors import nonzero as nonzero
from .vectors import or_ as or_
from .vectors import pair as pair
from .vectors import rounded_to_float32 as rounded_to_float32
from .vectors import run_intrinsic as run_intrinsic
from .vectors import scalar_constant as scalar_constant
from .vectors import select as select
from .vectors import shift_left as shift_left
from .vectors import shift_right as shift_right
from .vectors import shift_right_signed as shift_right_signed
from .vectors import shuffle as shuffle
from .vectors import splat as splat
from .vectors import splat_bool as splat_bool
from .vectors import subtract as subtract
from .vectors import tree_sum as tree_sum
from .vectors import widened_bits as widened_bits
from .vectors import with_sign_of as with_sign_of
from .vectors import xor as xor
from .vectors import xor_constant as xor_constant
from .vectors import zero_of as zero_of
from .vectors import zero_unless_finite as zero_unless_finite
from .vectors import zeros as zeros
from .vectors import zeros_like as zeros_like
