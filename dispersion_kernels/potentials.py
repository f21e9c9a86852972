"""Potentials of the dispersion loss: the function psi of a pair of tokens that the loss averages.

Every token ``z_i`` is row-transformed to ``x_i``; every ordered pair ``(i, j)`` of tokens of one sequence gets
``psi(c_ij)`` with ``c_ij = x_i . x_j``; the loss of a sequence is the mean of psi or, for most potentials, its
logarithm. A potential is a small frozen dataclass: its fields are numbers, its class attributes define the reduction,
``value`` is psi, and ``slope`` is the weight of the pair in the gradient.

Operators do not take objects as arguments: a built-in potential is passed as its name and fields. A user-defined
potential is called as the given object; where a compiler or a mode observes the operator, the potential is passed as a
key to its class and state (:func:`carry`). Classes are compared by identity, never by name.
"""

from __future__ import annotations

import dataclasses
import math
import uuid
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dispersion_kernels.checks import check_flag, check_number

__all__ = [
    "AngularSpread",
    "Decorrelation",
    "DispersiveL2",
    "L2Repel",
    "Orthogonalization",
    "PerplexityEntropy",
    "Potential",
    "Uniformity",
    "resolve_potential",
]


class Potential:
    """Potential psi(c) of the inner product ``c_ij = x_i . x_j`` of two row-transformed tokens.

    The loss of a sequence with ``n`` ordered pairs is ``log(sum psi / n) + loss_offset`` where ``reduction`` is
    ``"log_mean"``, ``sum psi / n`` where it is ``"mean"``. Its gradient with respect to ``x_i`` is
    ``f'(sum psi) * 2 * sum_j slope(c_ij) x_j``, chained through the row transform.

    To define a potential, subclass this class, preferably as a frozen dataclass, and write ``value`` and ``slope`` as
    PyTorch functions of ``c``, an fp32 tensor (fp64 for fp64 tokens) of any shape that must not be changed in place.
    ``slope`` is the derivative of ``value``, or its replacement for a straight-through estimator. The given object
    itself is called, wherever its class was defined. Subclasses of built-in potentials, too, are used through
    ``value``, ``slope`` and the attributes below alone.
    """

    reduction: ClassVar[Literal["mean", "log_mean"]] = "log_mean"
    """Reduction of psi over the pairs of a sequence to its loss."""
    row_transform: ClassVar[Literal["normalize", "standardize", "none"]] = "normalize"
    """Transform of each token: ``normalize``, x = z / (|z| + norm_eps), 0 for a zero token; ``standardize``,
    x = (z - mean(z)) / |z - mean(z)| over the features, 0 for a constant token, so that c is the correlation; ``none``,
    x = z, for built-in potentials of the distance."""
    norm_eps: ClassVar[float] = 0.0
    """Summand of the norm in ``normalize``; a field or a property may override it."""
    loss_offset: ClassVar[float] = 0.0
    """Constant added to the loss of ``log_mean``, without effect on the gradient; a field or a property may override
    it. (For log(mean psi + eps), add eps to ``value``.)"""
    triton: ClassVar[Any] = None
    """Function for ``impl="triton"``: ``staticmethod`` of a ``@triton.jit`` function ``(c, p0, p1, p2, p3)`` of a tile
    of c and at most four fields of the potential (attributes of the object, for a class that is no dataclass), that
    returns the tiles of psi and of its slope."""

    def name(self) -> str:
        """Name of a built-in potential, as ``"angular_spread"``; import path of the class of any other."""
        return _NAMES.get(type(self)) or f"{type(self).__module__}.{type(self).__qualname__}"

    def value(self, c: Tensor) -> Tensor:
        """Potential psi(c), elementwise."""
        raise NotImplementedError(f"{type(self).__name__} must define value(c) and slope(c)")

    def slope(self, c: Tensor) -> Tensor:
        """Derivative of psi with respect to c, or its straight-through replacement, elementwise."""
        raise NotImplementedError(f"{type(self).__name__} must define value(c) and slope(c)")

    def params(self) -> list[float]:
        """Fields as floats in the order of declaration; for a class that is no dataclass, the attributes of the object
        in the order of assignment."""
        if dataclasses.is_dataclass(self):
            return [float(getattr(self, field.name)) for field in dataclasses.fields(self)]
        return [float(value) for value in vars(self).values()]


class ExponentialPotential(Potential):
    """Potential psi = exp(e). The separate exponent e lets the sweep shift it, as a softmax does, so that psi neither
    overflows nor underflows."""

    slope_factor: float
    """Constant factor of the slope of the exponent, applied once, at the end of the sweep."""

    def exponent_(self, c: Tensor, slope: Tensor | None = None) -> Tensor:
        """Exponent e(c), in place of c. With ``varying_slope``, (d e / d c) / ``slope_factor`` is written to ``slope``,
        of the shape of c, where given; without, it is 1."""
        raise NotImplementedError

    varying_slope: ClassVar[bool] = False

    def distance_rate(self, features: int) -> float | None:
        """Factor of -|x_i - x_j|^2 in the exponent, for tokens of ``features`` features; None where the exponent is no
        multiple of the squared distance."""
        return None

    def exponent_range(self) -> tuple[float, float]:
        """Lower and upper bound of the exponent over all pairs of tokens."""
        raise NotImplementedError

    def value(self, c: Tensor) -> Tensor:
        return self.exponent_(c.clone()).exp_()

    def slope(self, c: Tensor) -> Tensor:
        slope = torch.ones_like(c)
        return self.exponent_(c.clone(), slope).exp_().mul_(slope).mul_(self.slope_factor)


class DistancePotential(ExponentialPotential):
    """Potential psi = exp(-|z_i - z_j|^2 / scale), a function of the distance alone."""

    row_transform: ClassVar[Literal["normalize", "standardize", "none"]] = "none"
    slope_factor = 1.0
    include_diagonal: bool

    def distance_scale(self, features: int) -> float:
        """Divisor of the squared distance in the exponent, for tokens of ``features`` features."""
        raise NotImplementedError

    def distance_rate(self, features: int) -> float | None:
        return 1 / self.distance_scale(features)

    def exponent_range(self) -> tuple[float, float]:
        return -math.inf, 0.0


@dataclass(frozen=True)
class AngularSpread(ExponentialPotential):
    """``psi = exp(-D / tau)``, ``D = arccos(clip(c, -1 + clamp, 1 - clamp)) / pi``; loss ``log(mean psi) + eps``.

    ``x = z / (|z| + eps)``. eps is a constant of the loss, as published, and enters the gradient through x alone. The
    clip is straight-through: outside the band the slope keeps its value at the boundary,
    ``psi / (pi tau sqrt(1 - clip(c)^2))``, so that condensed tokens are still pushed apart. 1 - clip(c)^2 is bounded
    below by 1.2e-7 (2.2e-16 for fp64), fp32's resolution of c near 1, so that the slope is finite for equal and
    opposite tokens at any ``clamp``. Source: Liu et al., ICML 2026, arXiv 2602.00217.

    ``tau`` > 0, 0 <= ``clamp`` < 1, ``eps`` >= 0; else ValueError.

    Example: ``fused_dispersion_loss(z, AngularSpread(tau=0.5))``
    """

    tau: float = 1.0
    clamp: float = 0.25
    eps: float = 0.01

    def __post_init__(self) -> None:
        _check_positive(self, "tau")
        _check_clamp(self)
        _check_eps(self)

    @property
    def norm_eps(self) -> float:  # type: ignore[override]
        return self.eps

    @property
    def loss_offset(self) -> float:  # type: ignore[override]
        return self.eps

    varying_slope: ClassVar[bool] = True

    @property
    def slope_factor(self) -> float:  # type: ignore[override]
        return 1 / (math.pi * self.tau)

    def exponent_(self, c: Tensor, slope: Tensor | None = None) -> Tensor:
        c.clamp_(self.clamp - 1, 1 - self.clamp)
        if slope is not None:
            _inverse_sine(c, self.clamp, slope)
        return c.acos_().mul_(-self.slope_factor)

    def exponent_range(self) -> tuple[float, float]:
        return -math.acos(self.clamp - 1) * self.slope_factor, -math.acos(1 - self.clamp) * self.slope_factor


@dataclass(frozen=True)
class Orthogonalization(Potential):
    """``psi = max(0, margin - D)^2`` with the D of :class:`AngularSpread`; loss ``mean psi``.

    ``x = z / (|z| + eps)``. The slope is ``2 max(0, margin - D) / (pi sqrt(1 - clip(c)^2))``, straight-through as that
    of :class:`AngularSpread`. Source: Liu et al., ICML 2026, arXiv 2602.00217.

    0 <= ``margin`` <= 1, a share of pi; ``clamp`` and ``eps`` as there; else ValueError.
    """

    reduction: ClassVar[Literal["mean", "log_mean"]] = "mean"
    margin: float = 0.5
    clamp: float = 0.25
    eps: float = 0.01

    def __post_init__(self) -> None:
        check_number("margin", self.margin)
        if not 0 <= self.margin <= 1:
            raise ValueError(
                f"margin must be in [0, 1], an angle as a share of pi, got {self.margin!r}; "
                "the published value is 0.5 (orthogonal tokens)"
            )
        _check_clamp(self)
        _check_eps(self)

    @property
    def norm_eps(self) -> float:  # type: ignore[override]
        return self.eps

    def value(self, c: Tensor) -> Tensor:
        return self._shortfall(c.clamp(self.clamp - 1, 1 - self.clamp)).square_()

    def slope(self, c: Tensor) -> Tensor:
        clipped = c.clamp(self.clamp - 1, 1 - self.clamp)
        slope = _inverse_sine(clipped, self.clamp, torch.empty_like(c))
        return slope.mul_(self._shortfall(clipped)).mul_(2 / math.pi)

    def _shortfall(self, clipped: Tensor) -> Tensor:
        """Shortfall max(0, margin - D) of the angle, in place of ``clipped``."""
        return clipped.acos_().mul_(-1 / math.pi).add_(self.margin).clamp_(min=0)


@dataclass(frozen=True)
class L2Repel(DistancePotential):
    """``psi = exp(-|z_i - z_j|^2 / tau)``; loss ``log(mean psi) + eps + norm_weight * mean(z^2)``.

    eps is a constant, as published, without effect on the gradient.

    The published code counts the diagonal (i = j) among the pairs, where psi is 1; at the norms of a language model
    all other pairs are then negligible and nothing is repelled. ``include_diagonal=False`` leaves the diagonal out.
    ``mean(z^2)`` is over the features of the tokens that have a partner. Source: Liu et al., ICML 2026, arXiv
    2602.00217.

    ``tau`` > 0, ``eps`` >= 0, ``norm_weight`` >= 0; else ValueError.
    """

    tau: float = 1.0
    eps: float = 0.01
    norm_weight: float = 0.1
    include_diagonal: bool = True

    def __post_init__(self) -> None:
        _check_positive(self, "tau")
        _check_eps(self)
        check_number("norm_weight", self.norm_weight)
        check_flag("include_diagonal", self.include_diagonal)
        if not 0 <= self.norm_weight < math.inf:
            raise ValueError(f"norm_weight must be a finite number >= 0, got {self.norm_weight!r}; 0 turns it off")

    @property
    def loss_offset(self) -> float:  # type: ignore[override]
        return self.eps

    def distance_scale(self, features: int) -> float:
        return self.tau


@dataclass(frozen=True)
class Decorrelation(Potential):
    """``psi = c^2``, c the Pearson correlation of two tokens over their F features; loss ``mean psi``.

    ``x = (z - mean(z)) / |z - mean(z)|``, the mean over the features; a constant token has x = 0 and no gradient.
    Source: Liu et al., ICML 2026, arXiv 2602.00217.
    """

    reduction: ClassVar[Literal["mean", "log_mean"]] = "mean"
    row_transform: ClassVar[Literal["normalize", "standardize", "none"]] = "standardize"

    def value(self, c: Tensor) -> Tensor:
        return c.square()

    def slope(self, c: Tensor) -> Tensor:
        return c.mul(2)


@dataclass(frozen=True)
class PerplexityEntropy(Potential):
    """``P_ij = softmax over j != i of -|z_i - z_j|^2 / sigma2``; loss ``mean over i of sum_j P_ij log2(P_ij + eps)``.

    The loss is the mean negative entropy of the tokens' neighbour distributions, as in t-SNE's perplexity. It is not a
    function of c alone: the sweep takes three passes, 5 B L^2 F FLOPs for loss and gradient. Source: Liu et al., ICML
    2026, arXiv 2602.00217.

    ``sigma2`` > 0, ``eps`` > 0; else ValueError.
    """

    row_transform: ClassVar[Literal["normalize", "standardize", "none"]] = "none"
    sigma2: float = 1.0
    eps: float = 0.01

    def __post_init__(self) -> None:
        _check_positive(self, "sigma2")
        check_number("eps", self.eps)
        if not 0 < self.eps < math.inf:
            raise ValueError(f"eps must be a finite number > 0, got {self.eps!r}; the published value is 0.01")


@dataclass(frozen=True)
class Uniformity(ExponentialPotential):
    """``psi = exp(-t |x_i - x_j|^2)`` with ``x = z / |z|``; loss ``log(mean psi)``.

    A zero token has x = 0 and no gradient. Source: Wang & Isola, ICML 2020, arXiv 2005.10242.

    ``t`` > 0; else ValueError.
    """

    t: float = 2.0

    def __post_init__(self) -> None:
        _check_positive(self, "t")

    @property
    def slope_factor(self) -> float:  # type: ignore[override]
        return 2 * self.t

    def exponent_(self, c: Tensor, slope: Tensor | None = None) -> Tensor:
        return c.sub_(1).mul_(2 * self.t)

    def distance_rate(self, features: int) -> float | None:
        return self.t

    def exponent_range(self) -> tuple[float, float]:
        return -4 * self.t, 0.0


@dataclass(frozen=True)
class DispersiveL2(DistancePotential):
    """``psi = exp(-|z_i - z_j|^2 / (F tau))``, the diagonal counted; loss ``log(mean psi)``.

    The InfoNCE-L2 form of the dispersive loss. Source: Wang & He, 2025, arXiv 2506.09027. ``tau`` > 0; else ValueError.
    """

    tau: float = 1.0
    include_diagonal: bool = True

    def __post_init__(self) -> None:
        _check_positive(self, "tau")
        check_flag("include_diagonal", self.include_diagonal)

    def distance_scale(self, features: int) -> float:
        return self.tau * features


BUILT_IN: dict[str, type[Potential]] = {
    "angular_spread": AngularSpread,
    "orthogonalization": Orthogonalization,
    "l2_repel": L2Repel,
    "decorrelation": Decorrelation,
    "perplexity_entropy": PerplexityEntropy,
    "uniformity": Uniformity,
    "dispersive_l2": DispersiveL2,
}
_TEMPERATURES: dict[type[Potential], str] = {
    AngularSpread: "tau",
    L2Repel: "tau",
    DispersiveL2: "tau",
    PerplexityEntropy: "sigma2",
    Uniformity: "t",
}
_NAMES: dict[type[Potential], str] = {cls: name for name, cls in BUILT_IN.items()}


def resolve_potential(potential: str | Potential, tau: float | Tensor | None = None) -> Potential:
    """Potential of the name ``potential``, with its field ``tau`` where given; a given :class:`Potential` itself.

    Raises:
        ValueError: an unknown name, ``tau`` for a potential without that field, or a value out of range.
        TypeError: ``potential`` is neither a name nor a :class:`Potential`.
    """
    if isinstance(potential, Potential):
        if tau is not None:
            raise ValueError(
                f"tau given beside a potential that is an instance, {potential!r}; "
                "set it there: dataclasses.replace(potential, ...)"
            )
        _check_own(potential)
        return potential
    if not isinstance(potential, str):
        given_class = isinstance(potential, type) and issubclass(potential, Potential)
        remedy = f"; give an instance: {potential.__name__}()" if given_class else ""
        raise TypeError(f"potential must be a name or a Potential, got {type(potential).__name__}{remedy}")
    if potential not in BUILT_IN:
        raise ValueError(f"unknown potential {potential!r}; available: {', '.join(BUILT_IN)}, or a Potential instance")
    cls: Any = BUILT_IN[potential]
    named: Potential
    if tau is None:
        named = cls()
    # Fields have defaults and are thus attributes of the class; torch.compile does not trace dataclasses.fields.
    elif hasattr(cls, "tau"):
        named = cls(tau=tau)
    else:
        fields = ", ".join(field.name for field in dataclasses.fields(cls)) or "none"
        raise ValueError(
            f"tau={tau!r} was given, but potential {potential!r} has no tau; its parameters: {fields}, fields of "
            f"{cls.__name__}(...)"
        )
    return named


def temperature_field(potential: Potential) -> str | None:
    """Name of the field of a built-in potential that may be a tensor and has a derivative; None where there is none."""
    return _TEMPERATURES.get(type(potential))


def temperature_of(potential: Potential) -> Tensor | None:
    """Temperature of the potential, a tensor ``[]``; None where it is a number or there is none."""
    field = temperature_field(potential)
    value = None if field is None else getattr(potential, field)
    return value.reshape(()) if isinstance(value, Tensor) else None


def at_temperature(potential: Potential, value: float | Tensor) -> Potential:
    """Copy of the potential with ``value`` in its temperature field."""
    built_in: Any = potential
    fields = {field.name: getattr(potential, field.name) for field in dataclasses.fields(built_in)}
    cls: Any = type(potential)
    changed: Potential = cls(**{**fields, str(temperature_field(potential)): value})
    return changed


def is_built_in(potential: Potential) -> bool:
    """Whether the type of the potential is built in. Subclasses do not count: they may override ``value``."""
    return type(potential) in _NAMES


class Own(Potential):
    """User-defined potential as the backends see it: value, slope and reduction. The exponent or distance that a
    subclass of a built-in potential inherits is hidden, because the subclass may have replaced the value."""

    def __init__(self, given: Potential) -> None:
        self.given = given
        self.reduction, self.row_transform = given.reduction, given.row_transform  # type: ignore[misc]
        self.norm_eps, self.loss_offset = given.norm_eps, given.loss_offset  # type: ignore[misc]
        self.triton = given.triton  # type: ignore[misc]
        self.name, self.params = given.name, given.params  # type: ignore[method-assign]

    def value(self, c: Tensor) -> Tensor:
        return self._checked("value", self.given.value(c), c)

    def slope(self, c: Tensor) -> Tensor:
        return self._checked("slope", self.given.slope(c), c)

    def _checked(self, method: str, result: Any, c: Tensor) -> Tensor:
        wanted = f"{type(self.given).__name__}.{method}(c) must return a tensor of the shape of c"
        if not isinstance(result, Tensor):
            raise TypeError(f"{wanted}, got {result!r}; for a constant return torch.full_like(c, constant)")
        if result.shape != c.shape:
            raise ValueError(f"{wanted}, {tuple(c.shape)}, got {tuple(result.shape)}; psi is a function of each entry")
        return result


def for_backends(potential: Potential) -> Potential:
    """Built-in potential itself; :class:`Own` of a user-defined one."""
    return potential if is_built_in(potential) else Own(potential)


# Meaning of each key of a user-defined potential: a class and the state of its objects without their numbers, or an
# object. Kept as long as the process lives, as are the compiled graphs that hold the keys.
_MEANINGS: dict[str, tuple[type[Potential], _Constants] | Potential] = {}
_KEYS: dict[object, str] = {}
# Name, type and value of each attribute; the value is None for numbers, which are passed beside the key.
_Constants = tuple[tuple[str, str, Any], ...]


def carry(potential: Potential) -> tuple[str, list[float]]:
    """Name or key, and numbers, that an operator takes in place of ``potential``. :func:`carried` is the inverse.

    Objects of one class whose attributes are numbers and equal constants share a key, so that a compiler does not
    compile again for an equal object; any other object has its own key. ``torch.compile`` traces this function, but not
    the registration.
    """
    if is_built_in(potential):
        return potential.name(), potential.params()
    constants: list[tuple[str, str, Any]] = []
    numbers: list[float] = []
    for name, value in vars(potential).items():
        if type(value) is float or (type(value) is int and abs(value) < 2**53):
            constants.append((name, "float" if type(value) is float else "int", None))
            numbers.append(float(value))
        elif value is None or type(value) is bool or type(value) is str:
            constants.append((name, "constant", value))
        else:
            return _key_of_object(potential, tuple(vars(potential))), []
    if _has_slots(type(potential)):
        return _key_of_object(potential, tuple(vars(potential))), []
    return _key_of_state(type(potential), tuple(constants)), numbers


def _has_slots(cls: type[Potential]) -> bool:
    """Whether objects of ``cls`` have slots, state that ``vars`` does not show."""
    return any(vars(base).get("__slots__") for base in cls.__mro__)


def _key_of_state(cls: type[Potential], constants: _Constants) -> str:
    return _key((cls, repr(constants)), (cls, constants), cls)


def _key_of_object(potential: Potential, attributes: tuple[str, ...]) -> str:
    if not vars(potential).keys() >= set(attributes):  # the compiler's stand-in for an object made in compiled code
        raise TypeError(
            f"potential {potential.name()!r} was made inside of a function that torch.compile compiles, and has an "
            "attribute that is no number, boolean or string; make it outside of the function"
        )
    return _key(id(potential), potential, type(potential))


# The mark makes torch.compile call these functions and keep their results, as torch.compiler.assume_constant_result
# does, which would import the compiler, and Triton with it.
for _function in (_has_slots, _key_of_state, _key_of_object):
    vars(_function)["_dynamo_marked_constant"] = True


def _key(what: object, meaning: tuple[type[Potential], _Constants] | Potential, cls: type[Potential]) -> str:
    if what not in _KEYS:
        # Keys are unique over processes: an exported graph must not find another potential where it is loaded.
        _KEYS[what] = f"{cls.__module__}.{cls.__qualname__}:{uuid.uuid4().hex}"
        _MEANINGS[_KEYS[what]] = meaning
    return _KEYS[what]


def carried(key: str, numbers: list[float]) -> Potential:
    """Potential from which :func:`carry` made ``key`` and ``numbers``, or an equal one."""
    if key in BUILT_IN:
        cls: Any = BUILT_IN[key]
        fields: Any = dataclasses.fields(cls)
        values = {field.name: type(field.default)(n) for field, n in zip(fields, numbers, strict=True)}
        built_in: Potential = cls(**values)
        return built_in
    if key not in _MEANINGS:
        raise ValueError(
            f"potential {key!r} is not known in this process; an exported program of a potential of your own runs in "
            "the process that exported it alone, one of a built-in potential anywhere"
        )
    meaning = _MEANINGS[key]
    if isinstance(meaning, Potential):
        return meaning
    own, constants = meaning
    potential = object.__new__(own)
    rest = iter(numbers)
    convert = {"float": float, "int": int}
    # The state is set directly, without __init__ and the __setattr__ of a frozen dataclass.
    vars(potential).update(
        (name, convert[kind](next(rest)) if kind in convert else value) for name, kind, value in constants
    )
    return potential


def _inverse_sine(clipped: Tensor, clamp: float, out: Tensor) -> Tensor:
    """1 / sqrt(1 - clip(c)^2), written to ``out``. 1 - clip(c)^2 is bounded below by the dtype's eps, its resolution of
    c near 1, because the quotient is infinite at |c| = 1."""
    torch.addcmul(clipped.new_ones(()), clipped, clipped, value=-1, out=out)
    eps = torch.finfo(out.dtype).eps
    if clamp < eps:
        out.clamp_(min=eps)
    return out.rsqrt_()


def _check_positive(potential: Potential, field: str) -> None:
    value = getattr(potential, field)
    if isinstance(value, Tensor) and field == temperature_field(potential):
        if value.numel() != 1 or not value.is_floating_point():
            raise TypeError(f"{field} must be a number, or a floating tensor of one, got {value!r}")
        return  # the operator checks the value of a tensor
    check_number(field, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{field} must be a finite number > 0 for {potential.name()!r}, got {value!r}")


def _check_clamp(potential: AngularSpread | Orthogonalization) -> None:
    check_number("clamp", potential.clamp)
    if not 0 <= potential.clamp < 1:
        raise ValueError(
            f"clamp must be in [0, 1), got {potential.clamp!r}: cosines are clipped to [-1 + clamp, 1 - clamp]; "
            "the published value is 0.25"
        )


def _check_eps(potential: AngularSpread | Orthogonalization | L2Repel) -> None:
    check_number("eps", potential.eps)
    if not 0 <= potential.eps < math.inf:
        raise ValueError(f"eps must be a finite number >= 0, got {potential.eps!r}; the published value is 0.01")


def _check_own(potential: Potential) -> None:
    if potential.reduction not in ("mean", "log_mean"):
        raise ValueError(
            f"potential {type(potential).__name__} has reduction={potential.reduction!r}; it must be 'mean' or "
            "'log_mean'"
        )
    if potential.row_transform not in ("normalize", "standardize", "none"):
        raise ValueError(
            f"potential {type(potential).__name__} has row_transform={potential.row_transform!r}; it must be "
            "'normalize' or 'standardize'"
        )
    if potential.row_transform == "none" and not is_built_in(potential):
        raise ValueError(
            f"potential {type(potential).__name__} has row_transform='none'; a potential of your own is a function of "
            "the cosine ('normalize') or of the correlation ('standardize')"
        )
