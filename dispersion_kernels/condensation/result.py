"""Result of a measurement of condensation: dataclasses, their JSON, data frame and table."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dispersion_kernels._version import __version__
from dispersion_kernels.gpt2.files import replaced

BINS = 200
"""Number of bins, of width 0.01, of a histogram of cosines over [-1, 1]. A bin holds its lower edge; the last one holds
1, too."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Probabilities of :attr:`CosineStatistics.quantiles`."""
PUBLISHED_BINS = 128
"""Number of bins of the published histogram over [-1, 1]."""
FORMAT = 1
"""Version of the JSON file, which changes when a field changes its meaning."""


@dataclass(frozen=True)
class CosineStatistics:
    """Statistics of the cosines of the pairs i < j of tokens within each text, over all texts."""

    pairs: int
    """Number of unordered pairs."""
    mean: float
    """Mean over texts of :attr:`text_means`, in which each text counts once, as in ``mean_pairwise_cosine``."""
    interval: tuple[float, float]
    """95% confidence interval of :attr:`mean`, by bootstrap over texts; ``(mean, mean)`` for one text."""
    standard_deviation: float
    """Standard deviation of the pairs, each of which counts once."""
    quantiles: tuple[float, ...]
    """Quantiles of the pairs at :data:`QUANTILES`, interpolated in the histogram; in error by at most a bin, 0.01."""
    histogram: tuple[int, ...]
    """Counts of pairs in :data:`BINS` bins over [-1, 1]."""
    text_means: tuple[float, ...]
    """Mean cosine of each text's pairs, in the order of the texts; NaN for a text without a pair."""


@dataclass(frozen=True)
class Layer:
    """Measurement of one layer. Rank, direction and norm are of the content tokens of all texts, because one attention
    sink may be a thousand times as long as other tokens; NaN without content tokens."""

    name: str
    """``"embedding"``, ``"block 1"`` and so on, before the final norm; ``"final norm"`` behind it; ``"layer 1"`` and so
    on of tensors."""
    all_tokens: CosineStatistics
    content_tokens: CosineStatistics | None
    """The same without position 0 and special tokens; None where no text has two such tokens."""
    effective_rank: float
    """Exponential of the entropy of the eigenvalues' shares of the trace of the tokens' F x F covariance (Roy and
    Vetterli, 2007): 1 for tokens on a line, F for isotropic ones, NaN for equal ones."""
    first_direction: float
    """Share of the covariance's trace that its largest eigenvalue has."""
    mean_norm: float
    """Mean Euclidean norm of a content token."""


@dataclass(frozen=True)
class Trend:
    """Rank correlation of the mean cosine of all tokens with the depth, over the blocks; the embedding and the final
    norm do not count. NaN for fewer than two blocks. Intervals are 95%, by bootstrap over texts."""

    spearman: float
    spearman_interval: tuple[float, float]
    kendall: float
    kendall_interval: tuple[float, float]


@dataclass(frozen=True)
class PublishedMeasurement:
    """Figures of the published procedure, from the matrix of cosines averaged entry by entry over texts."""

    histogram_of_averaged_matrix: tuple[tuple[float, ...], ...]
    """Density of the matrix's entries, diagonal in, ``[layers][128]``, over [-1, 1]."""
    mean_by_layer: tuple[float, ...]
    """Mean of the matrix's entries, diagonal in."""
    spearman: float
    """Rank correlation of :attr:`mean_by_layer` with the layer's number."""
    kendall: float


@dataclass(frozen=True)
class Condensation:
    """Measurement of one model by :func:`~dispersion_kernels.condensation.measure_condensation`."""

    model: str
    """Name given, or class of the model."""
    initialised: bool
    """Whether the weights are a random initialisation of the same configuration."""
    layers: tuple[Layer, ...]
    trend: Trend
    texts: int
    """Number of texts measured."""
    tokens: int
    """Number of tokens measured."""
    skipped: int
    """Number of texts skipped because they have fewer than two tokens."""
    options: dict[str, Any]
    published: PublishedMeasurement | None = None
    version: str = __version__
    """Version of dispersion-kernels."""
    format: int = FORMAT

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON of all fields, and of NaN as ``null``; written to ``path`` where one is given, all of it or nothing."""
        text = json.dumps(_without_nan(asdict(self)), allow_nan=False) + "\n"
        if path is not None:
            if not isinstance(path, str | os.PathLike):
                raise TypeError(f"path must be a string or a path, got {path!r}")
            with replaced(Path(path)) as file:
                file.write(text.encode())
        return text

    @classmethod
    def from_json(cls, path_or_text: str | Path) -> Condensation:
        """Measurement from a file of :meth:`to_json`, or from its text.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the content is no measurement, or one of a later format.
        """
        if not isinstance(path_or_text, str | os.PathLike):
            raise TypeError(f"path_or_text must be a path, or JSON as a string, got {path_or_text!r}")
        if isinstance(path_or_text, str) and path_or_text.lstrip().startswith("{"):
            source, text = "path_or_text", path_or_text
        else:
            source, text = str(path_or_text), Path(path_or_text).read_text("utf-8", errors="replace")
        try:
            values = json.loads(text)
            if not isinstance(values, dict):
                raise TypeError(f"it is a {type(values).__name__}")
            if values.get("format") != FORMAT:
                raise ValueError(f"its format is {values.get('format')!r}, this version reads {FORMAT}")
            return _condensation(values)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{source} is not a measurement written by Condensation.to_json ({error}); measure again, or read it "
                "with the version that wrote it"
            ) from error

    def to_frame(self) -> Any:
        """:class:`pandas.DataFrame` with a row for each layer and each choice of tokens, ``"all"`` or ``"content"``."""
        try:
            import pandas
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("to_frame needs pandas: pip install pandas", name=error.name) from error
        rows = []
        for number, layer in enumerate(self.layers):
            for tokens, cosines in (("all", layer.all_tokens), ("content", layer.content_tokens)):
                if cosines is None:
                    continue
                quantiles = {f"q{100 * q:02.0f}": x for q, x in zip(QUANTILES, cosines.quantiles, strict=True)}
                rows.append(
                    {
                        **{"model": self.model, "initialised": self.initialised, "number": number, "layer": layer.name},
                        **{"tokens": tokens, "pairs": cosines.pairs, "mean": cosines.mean},
                        **{"low": cosines.interval[0], "high": cosines.interval[1]},
                        **{"standard_deviation": cosines.standard_deviation, **quantiles},
                        **{"effective_rank": layer.effective_rank, "first_direction": layer.first_direction},
                        "mean_norm": layer.mean_norm,
                    }
                )
        return pandas.DataFrame(rows)

    def summary(self) -> str:
        """Table of the layers, as text."""
        name = f"{self.model}, random initialisation" if self.initialised else self.model
        skipped = f", {self.skipped} too short" if self.skipped else ""
        rows = [("layer", "cosine", "95% interval", "sd", "content", "eff. rank", "1st dir.", "norm")]
        for layer in self.layers:
            all_tokens, content = layer.all_tokens, layer.content_tokens
            low, high = all_tokens.interval
            rows.append(
                (
                    *(layer.name, f"{all_tokens.mean:.3f}", f"{low:.3f} to {high:.3f}"),
                    f"{all_tokens.standard_deviation:.3f}",
                    "-" if content is None else f"{content.mean:.3f}",
                    *(f"{layer.effective_rank:.1f}", f"{layer.first_direction:.1%}", f"{layer.mean_norm:.4g}"),
                )
            )
        trend = self.trend
        return "\n".join(
            [
                f"{name}: {self.texts} texts, {self.tokens} tokens{skipped}",
                *aligned(rows),
                f"trend over blocks: Spearman {_with_interval(trend.spearman, trend.spearman_interval)}, "
                f"Kendall {_with_interval(trend.kendall, trend.kendall_interval)}",
            ]
        )


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, its first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if n else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _with_interval(value: float, interval: tuple[float, float]) -> str:
    return f"{value:.2f} ({interval[0]:.2f} to {interval[1]:.2f})"


def _without_nan(value: Any) -> Any:
    """Copy of nested dicts and lists with None in place of NaN, for which JSON has no word."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _condensation(values: Mapping[str, Any]) -> Condensation:
    given = _fields(Condensation, "it", values)
    layers = tuple(_layer(f"layer {n}", layer) for n, layer in enumerate(_list("layers", given["layers"])))
    published = given["published"] and _fields(PublishedMeasurement, "published", given["published"])
    if published:
        histograms = _list("published", published["histogram_of_averaged_matrix"])
        published = PublishedMeasurement(
            tuple(_numbers("a published histogram", row, PUBLISHED_BINS) for row in histograms),
            _numbers("published means", published["mean_by_layer"], len(histograms)),
            _number("published spearman", published["spearman"]),
            _number("published kendall", published["kendall"]),
        )
    trend = _fields(Trend, "trend", given["trend"])
    for name, kind in (("model", str), ("initialised", bool), ("options", dict), ("version", str)):
        if not isinstance(given[name], kind):
            raise TypeError(f"its {name} is {given[name]!r}")
    counts = {name: _count(name, given[name]) for name in ("texts", "tokens", "skipped")}
    rank = Trend(
        _number("spearman", trend["spearman"]),
        _interval("spearman_interval", trend["spearman_interval"]),
        _number("kendall", trend["kendall"]),
        _interval("kendall_interval", trend["kendall_interval"]),
    )
    return Condensation(**{**given, **counts, "layers": layers, "trend": rank, "published": published or None})


def _layer(which: str, values: Any) -> Layer:
    given = _fields(Layer, which, values)
    numbers = {name: _number(name, given[name]) for name in ("effective_rank", "first_direction", "mean_norm")}
    content = given["content_tokens"]
    return Layer(
        name=str(given["name"]),
        all_tokens=_cosines(f"{which}'s all_tokens", given["all_tokens"]),
        content_tokens=None if content is None else _cosines(f"{which}'s content_tokens", content),
        **numbers,
    )


def _cosines(which: str, values: Any) -> CosineStatistics:
    given = _fields(CosineStatistics, which, values)
    return CosineStatistics(
        pairs=_count("pairs", given["pairs"]),
        mean=_number("mean", given["mean"]),
        interval=_interval("interval", given["interval"]),
        standard_deviation=_number("standard_deviation", given["standard_deviation"]),
        quantiles=_numbers("quantiles", given["quantiles"], len(QUANTILES)),
        histogram=tuple(_count("histogram", n) for n in _list("histogram", given["histogram"], BINS)),
        text_means=_numbers("text_means", given["text_means"]),
    )


def _fields(kind: type, which: str, values: Any) -> dict[str, Any]:
    """Values of the fields of the dataclass ``kind``, all of them and no other."""
    if not isinstance(values, dict):
        raise TypeError(f"{which} is {values!r}")
    names = {field.name for field in fields(kind)}
    if missing := names - values.keys():
        raise ValueError(f"{which} lacks {min(missing)}")
    if unknown := values.keys() - names:
        raise ValueError(f"{which} has {min(map(repr, unknown))}, which does not belong there")
    return dict(values)


def _list(name: str, values: Any, length: int | None = None) -> list[Any]:
    if not isinstance(values, list) or (length is not None and len(values) != length):
        raise TypeError(f"{name} must be a list{'' if length is None else f' of {length}'}")
    return values


def _numbers(name: str, values: Any, length: int | None = None) -> tuple[float, ...]:
    return tuple(_number(name, value) for value in _list(name, values, length))


def _interval(name: str, values: Any) -> tuple[float, float]:
    low, high = _numbers(name, values, 2)
    return low, high


def _number(name: str, value: Any) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return float(value)


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TypeError(f"{name} must be a count, got {value!r}")
    return value
