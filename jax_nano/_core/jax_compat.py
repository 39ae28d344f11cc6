"""The only file with private imports from JAX and with branches on its version (0.10.0 to 0.12.x).

(One branch is in `custom_calls`, as it is needed when the package is imported, which must not import all of this.)

Everything here gives what jnp and lax themselves do to their arguments, so that jax_nano agrees with them
to the last error message, or reaches a hook that JAX keeps to itself.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

import jax
from jax import Array
from jax._src import compiler, core, dispatch, source_info_util, stages, xla_bridge
from jax._src.dtypes import check_and_canonicalize_user_dtype
from jax._src.interpreters import ad, batching, mlir, pxla
from jax._src.interpreters import partial_eval as pe
from jax._src.lax.lax import _convert_element_type, canonicalize_precision, get_algorithm_compute_types
from jax._src.lib import version as jaxlib_version
from jax._src.numpy.util import ensure_arraylike_tuple
from jax._src.sharding_impls import canonicalize_sharding as _canonicalize_sharding
from jax._src.util import canonicalize_axis
from jax.extend.core import Primitive
from jax.extend.core.primitives import dot_general_p, transpose_p
from jax.extend.mlir import ir
from jax.sharding import NamedSharding, PartitionSpec

from jax_nano._core.imports import when_imported

__all__ = [
    "INLINE",
    "INLINES_SMALL_PRODUCTS",
    "KEEPS_DONATION",
    "NoHook",
    "OutSharding",
    "analyse_costs_of",
    "attributes_of",
    "batch_sharding",
    "canonicalize_axes",
    "canonicalize_precision",
    "canonicalize_sharding",
    "check_and_canonicalize_user_dtype",
    "convert_element_type",
    "cotangent_sharding",
    "cpu_devices",
    "define_bilinear",
    "ensure_arraylike",
    "get_algorithm_compute_types",
    "in_jit",
    "lower_with_types",
    "lowering_platforms",
    "mark_lowered_modules",
    "match_varying_axes",
    "module_cache",
    "permute_sharding",
    "program_name",
    "register_hlo_transformation",
    "require_devices",
    "require_hlo_transformations",
    "retry_failed_compilations",
    "set_frontend_attributes",
    "sharding_for_vmap",
    "treat_as_dot_general",
    "untransposed",
    "when_tables_exist",
]

# An equation's source is the line that called us, as it is for JAX's own functions.
source_info_util.register_exclusion(str(Path(__file__).parent.parent) + os.sep)

OutSharding: TypeAlias = NamedSharding | PartitionSpec | None

# What to pass as jit's `inline` so that a call leaves its equations in the caller's jaxpr. 0.11 took `True`
# to mean inlining in the lowered module, and gave this its own name.
INLINE: Any = jax.Inline.JAX_EARLY if hasattr(jax, "Inline") else True

# Whether a module that an HLO transformation changed keeps its donated arguments (JAX issue 40280).
KEEPS_DONATION: bool = jaxlib_version >= (0, 11, 1)

# Whether YNNPACK computes wrong values beyond the first 32768 columns of a product that is fused with what follows it:
# jaxlib 0.10.2 does, for [3, 3] x [40000, 3] along the last dimensions, then squared and summed; 0.12.0 does not.
# Releases between them were not tried.
MISCOUNTS_LARGE_FUSED_DOTS: bool = jaxlib_version < (0, 12, 0)

# Whether XLA computes products up to 6x6x6 inside of small loops that it compiles into one function: jaxlib 0.10.2
# does, 0.12.0 only up to 3x3x3 (at 4x4x4 its loop takes 18 times as long). Releases between them were not tried.
INLINES_SMALL_PRODUCTS: bool = jaxlib_version < (0, 12, 0)

# Renamed in 0.10.1. Casts an operand that is replicated over a manual mesh axis to one that varies over it
# where the other operand varies; its transpose is the psum of the gradient of a replicated weight.
match_varying_axes: Callable[..., Any] = (
    core.auto_insert_reshard if hasattr(core, "auto_insert_reshard") else getattr(core, "standard_insert_pvary")  # noqa: B009
)

# From some release on, a linearization rule returns one value more.
_STRUCTURED_RESIDUALS = "structured_residuals" in ad.LinearizeTrace.process_primitive.__code__.co_names

# 0.11 added layouts to the types that a lowered result must be annotated with.
lower_with_types: Callable[..., Any] = (
    getattr(mlir, "lower_with_explicit_types", None) or mlir.lower_with_sharding_in_types
)


def canonicalize_sharding(sharding: OutSharding, name: str) -> NamedSharding | None:
    """An out_sharding with its mesh; None if it says nothing. TypeError or ValueError if it is not one."""
    if sharding is None:
        return None
    canonical: NamedSharding | None = _canonicalize_sharding(sharding, name)
    return canonical


def ensure_arraylike(name: str, *args: Any) -> tuple[Array, ...]:
    """Arguments as arrays; TypeError if one cannot be."""
    return args if all(isinstance(x, Array) for x in args) else ensure_arraylike_tuple(name, args)


def convert_element_type(x: Array, dtype: Any, weak_type: bool) -> Array:
    """lax.convert_element_type that also sets the weak type, as the ends of jnp's functions do."""
    return x if x.dtype == dtype and x.weak_type == weak_type else _convert_element_type(x, dtype, weak_type)


def canonicalize_axes(axes: Sequence[int], ndim: int) -> tuple[int, ...]:
    """Axes counted from the front; ValueError if one is out of range."""
    return tuple(canonicalize_axis(axis, ndim) for axis in axes)


def batch_sharding(x: Array) -> tuple[Any, ...]:
    """The explicit sharding of each dimension of an operand of matmul but its last two."""
    spec = tuple(jax.typeof(x).sharding.spec)
    return (spec + (None,) * (x.ndim - len(spec)))[:-2]


def permute_sharding(sharding: NamedSharding, perm: Sequence[int]) -> NamedSharding:
    """The sharding of transpose(x, perm), given that of x (a short spec is padded)."""
    spec = sharding.spec
    axes = (*spec, *(None,) * (len(perm) - len(spec)))
    return sharding.update(spec=spec.update(partitions=tuple(axes[i] for i in perm)))


def cotangent_sharding(aval: Any) -> NamedSharding | None:
    """The out_sharding that a product must have to be the cotangent of an operand, as in lax's rule."""
    sharding: NamedSharding = aval.sharding
    if sharding.mesh.empty:
        mesh = jax.sharding.get_abstract_mesh()
        return None if mesh.empty else NamedSharding(mesh, PartitionSpec(*(None,) * aval.ndim))
    return sharding.update(spec=sharding.spec.update(partitions=tuple(sharding.spec)))


def sharding_for_vmap(axis_data: Any, sharding: NamedSharding, dim: int) -> NamedSharding:
    """The out_sharding of a product under vmap, whose new dimension is `dim`."""
    padded = permute_sharding(sharding, range(max(len(sharding.spec), dim)))
    return batching.get_sharding_for_vmap(axis_data, padded, dim)


def untransposed(x: Any) -> tuple[Array, tuple[int, ...]] | None:
    """The array that `x` is a transpose of and the permutation, if `x` was traced as one."""
    equation: Any = getattr(x, "parent", None) if isinstance(x, core.Tracer) else None
    if equation is None or equation.primitive is not transpose_p:
        return None
    (source,) = equation.in_tracers
    return source, equation.params["permutation"]


def define_bilinear(primitive: Primitive, product: Callable[..., Array], *transposes: Callable[..., Array]) -> None:
    """ad.defbilinear, with tangents that are computed by `product`, which can fold transposes of its operands.

    JAX's own linearization rule would trace the product of a tangent separately, where transposes cannot be seen.
    """
    ad.defbilinear(primitive, *transposes)
    ad.defjvp(
        primitive,
        lambda g, x, y, **params: product(g, y, **params),
        lambda g, x, y, **params: product(x, g, **params),
    )

    def linearize(_is_vjp: bool, nonzero: Sequence[bool], x: Array, y: Array, **params: Any) -> tuple[Any, ...]:
        def tangent(residuals: tuple[Any, Any], *args: Any) -> Array:
            # 0.12 passes structured residuals before the tangents.
            x, y = residuals
            dx, dy = args[-2:]
            parts = [product(*pair, **params) for pair, here in (((dx, y), nonzero[0]), ((x, dy), nonzero[1])) if here]
            return parts[0] if len(parts) == 1 else ad.add_tangents(*parts)

        residuals = (x if nonzero[1] else None, y if nonzero[0] else None)
        return primitive.bind(x, y, **params), True, residuals, *(None,) * _STRUCTURED_RESIDUALS, tangent

    ad.primitive_linearizations[primitive] = linearize


# Modules of JAX with a table over primitives, by what jax_nano calls them.
_TABLES: Final = {
    "checkify": "jax._src.checkify",
    "jet": "jax.experimental.jet",
    "sparse": "jax.experimental.sparse.transform",
    "roofline": "jax.experimental.roofline.rooflines",
    "cost_estimate": "jax._src.pallas.cost_estimate",
}


def when_tables_exist(**actions: Callable[[Any], None]) -> None:
    """Calls each action with the module of JAX that holds the table, when that has been imported."""
    for name, action in actions.items():
        when_imported(_TABLES[name], action)


def treat_as_dot_general(primitive: Primitive, like: Callable[[dict[str, Any], Sequence[Any]], dict[str, Any]]) -> None:
    """Makes all policies of jax.checkpoint, also users' own, treat a primitive as lax.dot_general.

    Args:
      primitive: of one result. Where a policy would recompute lax.dot_general, it is asked about `primitive` as well.
      like: gives the primitive's parameters, for operands of these avals, those that lax.dot_general has.
    """

    def decide(policy: Callable[..., Any], avals: Sequence[Any], params: dict[str, Any]) -> Any:
        case = pe.ensure_enum(policy(dot_general_p, *avals[:2], **like(params, avals)))
        return pe.ensure_enum(policy(primitive, *avals, **params)) if isinstance(case, pe.RecomputeType) else case

    def partial_eval(policy: Any, unknown: Sequence[bool], instantiated: Sequence[bool], eqn: Any) -> tuple[Any, ...]:
        missing = [x for x, here in zip(eqn.invars, instantiated, strict=True) if isinstance(x, core.Var) and not here]
        if any(unknown):
            return None, eqn, [True], [True], missing
        avals = [x.aval for x in eqn.invars]
        case = decide(policy, avals, eqn.params)
        if isinstance(case, pe.SaveableType):
            return eqn, None, [False], [False], []
        if isinstance(case, pe.RecomputeType):
            return eqn, eqn.replace(), [False], [True], missing
        # One equation that computes and copies, one that copies back.
        there, back = (core.mem_kind_to_space(kind) for kind in (case.dst, case.src))

        def compute(*operands: Array) -> tuple[Array, Array]:
            out = primitive.bind(*operands, **eqn.params)
            return out, jax.device_put(out, there)

        (known,) = jax.make_jaxpr(jax.jit(compute))(*avals).eqns
        kept = known.outvars[1]
        (staged,) = jax.make_jaxpr(jax.jit(lambda x: jax.device_put(x, back)))(kept.aval).eqns
        known = known.replace(invars=eqn.invars, outvars=[*eqn.outvars, kept])
        return known, staged.replace(invars=[kept], outvars=eqn.outvars), [False], [True], [kept]

    pe.partial_eval_jaxpr_custom_rules[primitive] = partial_eval
    _define_remat(primitive, decide)


def _define_remat(primitive: Primitive, decide: Callable[..., Any]) -> None:
    """The same for the newer jax.checkpoint (the flag jax_remat3), in the form that this release of it asks for."""
    try:
        from jax._src.ad_checkpoint import primal_left_tangent_right
        from jax._src.interpreters import remat
    except ImportError:
        return
    theirs = remat.rules.get(dot_general_p)
    if theirs is None:
        return
    takes_trace = next(iter(inspect.signature(theirs).parameters)) == "trace"

    def rule(trace_or_policy: Any, *operands: Array, **params: Any) -> tuple[Any, ...]:
        compute = functools.partial(primitive.bind, **params)
        out = compute(*operands)
        policy = trace_or_policy.policy if takes_trace else trace_or_policy
        case = pe.Recompute if policy is None else decide(policy, [jax.typeof(x) for x in operands], params)
        if isinstance(case, pe.RecomputeType):
            return (out, (), lambda _, *xs: compute(*xs)) if takes_trace else (out, compute)
        if not takes_trace:
            return out, lambda *xs: primal_left_tangent_right(out, compute(*xs))
        kept = out = remat.reduce_precision(out)
        fetch: Callable[[Any], Any] = lambda x: x  # noqa: E731
        if isinstance(case, pe.Offloadable):
            there, back = (core.mem_kind_to_space(kind) for kind in (case.dst, case.src))
            kept = jax.device_put(out, there)
            fetch = functools.partial(jax.device_put, device=back)
        return out, kept, lambda kept, *xs: primal_left_tangent_right(fetch(kept), compute(*xs))

    remat.rules[primitive] = rule


def require_devices(primitive: Primitive) -> None:
    """Let the lowering rule see the device assignment, which custom_partitioning needs.

    Without it a program over several devices dies in an assertion. With it, a program that is lowered
    for an AbstractMesh alone, without devices, is refused by JAX with a ValueError that says so.
    """
    dispatch.prim_requires_devices_during_lowering.add(primitive)


def module_cache(ctx: mlir.LoweringRuleContext) -> dict[Any, Any]:
    """Where to keep what belongs to the module that is being lowered, by keys that are ours."""
    return ctx.module_context.cached_primitive_lowerings


def is_exported(ctx: mlir.LoweringRuleContext) -> bool:
    """Whether the module that is being lowered is for `jax.export`: it may be kept, sent, and changed by others."""
    return bool(ctx.module_context.lowering_parameters.for_export)


def program_name(ctx: mlir.LoweringRuleContext) -> str:
    """The name of the module that is being lowered."""
    return ir.StringAttr(ctx.module_context.module.operation.attributes["sym_name"]).value


def frames(ctx: mlir.LoweringRuleContext) -> Iterator[tuple[str, int]]:
    """File and line of each frame, but for JAX's own, of the stack that the equation comes from, innermost first."""
    for frame in source_info_util.user_frames(ctx.traceback):
        yield frame.file_name, frame.start_line


def location(ctx: mlir.LoweringRuleContext, name: str) -> ir.Location:
    """Of an operation of the equation that is being lowered, which XLA and profilers are to call `name`."""
    named: Any = _Named(name)
    return mlir.source_info_to_location(ctx.module_context, named, ctx.name_stack, ctx.traceback)


class _Named(NamedTuple):
    """As much of a primitive as a location needs."""

    name: str


def attributes_of(operation: Any) -> dict[str, Any]:
    """The attributes of an IR operation; jaxlib's mapping of them iterates over names, or over pairs."""
    names = (getattr(item, "name", item) for item in operation.attributes)
    return {name: operation.attributes[name] for name in names}


def set_frontend_attributes(operation: Any, attributes: Mapping[str, str]) -> None:
    """Adds to what XLA passes on with an operation or a module without looking at it."""
    name = "mhlo.frontend_attributes"
    with operation.context:
        known = attributes_of(operation).get(name)
        merged = {} if known is None else {x.name: x.attr for x in known}
        merged.update({key: ir.StringAttr.get(value) for key, value in attributes.items()})
        operation.attributes[name] = ir.DictAttr.get(merged)


def lowering_platforms(ctx: mlir.LoweringRuleContext) -> tuple[str, ...]:
    """The platforms that the current equation is lowered for.

    A computation placed on the host of an accelerator (compute_on) is not ours: it counts as the
    accelerator's, so that it takes lax's own lowering.
    """
    return tuple(ctx.platforms or ctx.module_context.platforms)


class NoHook(Exception):
    """This JAX lacks a hook that is needed: the end of a sentence that begins with who needs it."""


def cpu_devices() -> int:
    """How many CPU devices there are; 0 where JAX's backends have not been started."""
    return jax.local_device_count("cpu") if xla_bridge.backends_are_initialized() else 0


def in_jit() -> bool:
    """Whether a function is being traced that will be compiled as part of a program."""
    return core.unsafe_am_i_under_a_jit()


def require_hlo_transformations() -> None:
    """NoHook before 0.10.2, which cannot register one, and where a later JAX lacks what the functions below change."""
    old = "needs JAX and jaxlib 0.10.2 or newer: this is {}"
    try:
        xla: Any = importlib.import_module("jax.extend.xla")
    except ImportError:
        raise NoHook(old.format(f"JAX {jax.__version__}")) from None
    if jaxlib_version < (0, 10, 2):
        raise NoHook(old.format(f"jaxlib {'.'.join(map(str, jaxlib_version))}"))
    lower, compile_and_load = (
        getattr(module, name, None)
        for module, name in ((mlir, "lower_jaxpr_to_module"), (compiler, "backend_compile_and_load"))
    )
    there = {
        "jax.extend.xla.register_hlo_module_transformation": hasattr(xla, "register_hlo_module_transformation"),
        "jax.extend.xla.PipelineStage.PRE_SCHEDULER": hasattr(getattr(xla, "PipelineStage", None), "PRE_SCHEDULER"),
        "mlir.lower_jaxpr_to_module(..., platforms=...)": _takes(lower, "platforms"),
        "compiler.backend_compile_and_load(backend, module, ...)": _takes(compile_and_load, "backend", "module"),
    }
    missing = [name for name, is_there in there.items() if not is_there]
    if missing:
        raise NoHook(f"does not work with JAX {jax.__version__}, which lacks {' and '.join(missing)}")


def _takes(function: Any, *parameters: str) -> bool:
    """Whether there is such a function with parameters of these names."""
    return callable(function) and set(parameters) <= set(inspect.signature(function).parameters)


def lower_scaled_matmul() -> None:
    """Give `jax.nn.scaled_matmul` a meaning on CPUs where JAX has none (0.10): that of JAX 0.12."""
    when_imported("jax._src.cudnn.scaled_matmul_stablehlo", _lower_scaled_matmul)


def _lower_scaled_matmul(module: Any) -> None:
    if hasattr(module, "_scaled_matmul_cpu_lowering_impl") or not hasattr(module, "_scaled_matmul_p"):
        return
    mlir.register_lowering(
        module._scaled_matmul_p, mlir.lower_fun(_scaled_matmul, multiple_results=False), platform="cpu"
    )


def _scaled_matmul(a: Array, b: Array, a_scales: Array, b_scales: Array, *, preferred_element_type: Any) -> Array:
    def scaled(x: Array, scales: Array) -> Array:
        blocks = jax.numpy.reshape(x.astype(preferred_element_type), (*scales.shape, -1))
        return jax.numpy.reshape(blocks * scales.astype(preferred_element_type)[..., None], x.shape)

    return jax.lax.dot_general(
        scaled(a, a_scales),
        scaled(b, b_scales),
        (((2,), (2,)), ((0,), (0,))),
        preferred_element_type=preferred_element_type,
    )


def register_hlo_transformation(name: str, transform: Callable[[bytes], bytes | None]) -> None:
    """Let `transform` change the modules that XLA compiles for CPUs, after its own passes.

    From 0.12 on this starts JAX's backends, if they are not, and never returns in a thread that is starting them.
    """
    from jax.extend import xla

    # The order of thunks is settled afterwards.
    xla.register_hlo_module_transformation(transform, name=name, stage=xla.PipelineStage.PRE_SCHEDULER, platforms="cpu")


def mark_lowered_modules(attributes: Callable[[], Mapping[str, str]]) -> None:
    """From now on, give each module that JAX lowers for CPUs what `attributes` returns then, as frontend attributes.

    XLA passes such attributes on, and they are part of the key of the persistent compilation cache. JAX has no public
    way to set them on a module. `attributes` is called in the thread and the context in which the program is lowered.
    """
    lower = mlir.lower_jaxpr_to_module

    @functools.wraps(lower)
    def lower_and_mark(*args: Any, **kwargs: Any) -> Any:
        result = lower(*args, **kwargs)
        if "cpu" in kwargs["platforms"] and (marks := attributes()):
            set_frontend_attributes(result.module.operation, marks)
        return result

    mlir.lower_jaxpr_to_module = lower_and_mark


def retry_failed_compilations(
    mark: str, begin: Callable[[], Any], failed: Callable[[str, Any, Exception], None]
) -> None:
    """From now on, where XLA fails to compile a module with this frontend attribute, compile it again without.

    If that succeeds, `failed` is called with the program's name, what `begin` returned before the first attempt and the
    error. If it does not, the program's own error is raised. JAX has no public way to do this.
    """
    compile_and_load = compiler.backend_compile_and_load

    @functools.wraps(compile_and_load)
    def compile_or_retry(backend: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
        operation, name = module.operation, "mhlo.frontend_attributes"
        marked = attributes_of(operation).get(name)
        if marked is None or all(x.name != mark for x in marked):
            return compile_and_load(backend, module, *args, **kwargs)
        before = begin()
        try:
            return compile_and_load(backend, module, *args, **kwargs)
        except Exception as error:
            first = error
        with operation.context:
            operation.attributes[name] = ir.DictAttr.get({x.name: x.attr for x in marked if x.name != mark})
        try:
            executable = compile_and_load(backend, module, *args, **kwargs)
        finally:
            operation.attributes[name] = marked
        failed(ir.StringAttr(operation.attributes["sym_name"]).value, before, first)
        return executable

    compiler.backend_compile_and_load = compile_or_retry


def analyse_costs_of(substitute: Callable[[bytes], bytes | None]) -> None:
    """From now on, cost_analysis() of lowered and compiled programs is that of what `substitute` makes of their HLO.

    Where it returns None, and on other platforms than CPUs, the analysis is of the program itself.
    """

    def analysed(client: Any, module: Any) -> Any:
        if client.platform != "cpu" or (other := substitute(module.as_serialized_hlo_module_proto())) is None:
            return None
        return analyse(client, type(module).from_serialized_hlo_module_proto(other))

    analyse = importlib.import_module("jax._src.lib")._jax.hlo_module_cost_analysis
    lowering: Any = pxla.MeshComputation
    executable: Any = stages.Executable
    lowered, compiled = lowering.cost_analysis, executable.cost_analysis

    @functools.wraps(lowered)
    def of_lowered(self: Any) -> Any:
        return analysed(self.compile_args["backend"], self.hlo().as_hlo_module()) or lowered(self)

    @functools.wraps(compiled)
    def of_compiled(self: Any) -> Any:
        result = compiled(self)
        loaded = self.xla_extension_executable()
        modules: list[Any] = loaded.hlo_modules() if loaded is not None else []
        return (analysed(loaded.client, modules[0]) if len(modules) == 1 else None) or result

    lowering.cost_analysis = of_lowered
    executable.cost_analysis = of_compiled
