"""Measurement of condensation in a model, text by text: :func:`measure_condensation`."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from dispersion_kernels.blocks import Stack, find_stack, hidden_states_of, is_pretrained, layer_numbers
from dispersion_kernels.checks import check_flag, check_tensor, layers_of
from dispersion_kernels.condensation import models
from dispersion_kernels.condensation.cosine import LayerSums, Texts, select_texts
from dispersion_kernels.condensation.intervals import mean_interval, scipy_stats, trend_of
from dispersion_kernels.condensation.published import AveragedMatrix, published_measurement
from dispersion_kernels.condensation.result import Condensation, CosineStatistics, Layer
from dispersion_kernels.gpt2.model import GPT2

Layers = str | Sequence[int]


def measure_condensation(
    model: nn.Module | str | Path | Sequence[Tensor],
    texts: Iterable[str] | Iterable[Any] | None = None,
    tokenizer: Any = None,
    *,
    layers: Layers = "all",
    stack: str | None = None,
    final_norm: bool = False,
    max_length: int = 512,
    add_special_tokens: bool = True,
    special_ids: Iterable[int] | None = None,
    mask: Tensor | None = None,
    batch_size: int = 8,
    published: bool = False,
    initialised: bool = False,
    name: str | None = None,
    progress: bool = True,
) -> Condensation:
    """Cosines of all pairs i != j of a text's tokens, ``z_i . z_j / (|z_i| |z_j|)``, layer by layer.

    Texts stream through the model; hooks measure each block's output inside the forward, in tiles. Memory beside the
    forward's: one batch of one layer, and half an F x F matrix in float64 for each layer. Blocks are measured
    before the final norm, also the last, which ``hidden_states`` of Hugging Face's models has behind it.

    Args:
        model: model of Hugging Face, :class:`~dispersion_kernels.gpt2.GPT2`, or module with a stack of blocks; or a
            folder or name to load (:func:`~dispersion_kernels.condensation.load_model`); or hidden states themselves, a
            list of ``[B, L, F]``, one a layer. The model runs without its head, on its device, in evaluation mode.
        texts: strings; or batches: ids ``[L]`` or ``[B, L]``, mappings with ``input_ids`` and ``attention_mask``, or
            inputs ``[B, L, F]``. Texts of fewer than two tokens are skipped and counted.
        tokenizer: tokenizer of the model, for strings: of transformers, of tokenizers, or a function to a list of ids.
        layers: ``"all"`` for the embedding and all blocks; ``"last"``, ``"early_half"``, ``"late_half"``; or numbers,
            0 for the embedding, blocks from 1; of hidden states, which have no embedding, from 1.
        stack: name of the stack of blocks where there are several. Default of an encoder-decoder: its encoder.
        final_norm: whether to measure the last hidden state behind the final norm, too.
        max_length: tokens of a string, from its beginning; at most the model's context. Batches are measured whole.
        add_special_tokens: whether the tokenizer adds its special tokens.
        special_ids: ids that are no content; default: the tokenizer's special tokens. Position 0 never is.
        mask: for hidden states, boolean ``[B, L]``: tokens that take part.
        batch_size: texts in a forward.
        published: whether to repeat the published procedure, too. It keeps one L x L matrix for each layer, and needs
            texts of one length.
        initialised: whether to measure a random initialisation of the model's configuration instead.
        name: name of the model in the result; default: the one it was loaded by, or its class.
        progress: whether a terminal shows a progress bar.

    Returns:
        :class:`Condensation`, with a :class:`Layer` for each layer, first layer first.

    Raises:
        ValueError, TypeError: an argument is wrong, all texts are too short, or a layer is not finite.
        ModuleNotFoundError: scipy or tqdm is missing.

    Source: Liu et al., ICML 2026, arXiv 2602.00217.

    Example: ``print(measure_condensation(model, texts, tokenizer).summary())``
    """
    for flag, value in (("final_norm", final_norm), ("published", published), ("initialised", initialised)):
        check_flag(flag, value)
    for flag, value in (("add_special_tokens", add_special_tokens), ("progress", progress)):
        check_flag(flag, value)
    check_count("max_length", max_length, 2)
    check_count("batch_size", batch_size, 1)
    if published and layers != "all":
        raise ValueError(f"published=True takes all layers, got layers={layers!r}; leave layers out")
    scipy_stats()  # its absence is said before the work
    options: dict[str, Any] = {"final_norm": final_norm, "published": published}
    if not isinstance(model, nn.Module | str | Path):
        if texts is not None or initialised:
            raise TypeError("hidden states are measured without texts and initialised; for these, give the model")
        run = _of_hidden_states(model, mask, layers, published)
        return run.result(name or "hidden states", False, options | {"layers": run.numbers()})
    if mask is not None:
        raise TypeError("mask is for hidden states; give texts as mappings with input_ids and attention_mask")

    if not isinstance(model, nn.Module):
        name = name or str(model)
        model, own_tokenizer = models.load_model(model, initialised=initialised)
        tokenizer = tokenizer or own_tokenizer
    elif initialised:
        name = name or models.name_of(model)
        model = models.initialised_like(model)
    reading = Reading(tokenizer, max_length, add_special_tokens, special_ids, batch_size)
    measured = MeasuredModel(model, stack)
    run = measured.run(layers, final_norm, published)
    with measured.evaluating(run):
        for batch in _progress(reading.batches(texts, measured), texts, progress):
            run.begin(batch)
            measured(batch.inputs)
            run.end()
    options |= {"layers": run.numbers(), "stack": measured.stack.name, "batch_size": batch_size}
    options |= {"max_length": measured.at_most(max_length), "add_special_tokens": add_special_tokens}
    options |= {"special_ids": sorted(reading.special_ids)}
    run.skipped += reading.skipped
    return run.result(name or models.name_of(model), initialised, options)


class _Batch(NamedTuple):
    inputs: dict[str, Tensor] | Tensor
    """Arguments of the model, by name; or the only one."""
    texts: Texts
    shape: tuple[int, int]
    first: int
    """Number of the batch's first text, among all that were given."""
    numbers: list[int]
    """Rows of the batch, counted from :attr:`first`, that are texts; the others are too short."""


@dataclass
class Tap:
    """Layer and what is measured of it."""

    name: str
    number: int
    sums: LayerSums | None
    matrix: AveragedMatrix | None
    calls: int = 0


@dataclass
class Run:
    """Measurement under way."""

    taps: list[Tap]
    texts: int = 0
    tokens: int = 0
    skipped: int = 0
    batch: _Batch | None = field(default=None, repr=False)

    def begin(self, batch: _Batch) -> None:
        self.batch = batch
        for tap in self.taps:
            tap.calls = 0

    def measure(self, tap: Tap, z: Tensor) -> None:
        """Adds a layer's hidden states of the present batch."""
        batch = self.batch
        if batch is None:
            return
        tap.calls += 1
        if tap.calls > 1:
            raise ValueError(
                f"{tap.name} ran more than once in a forward, as blocks do that share weights, and its calls cannot be "
                "told apart; measure hidden states instead: measure_condensation(output.hidden_states)"
            )
        rows = math.prod(batch.shape)
        if z.dim() < 2 or not z.is_floating_point() or math.prod(z.shape[:-1]) != rows:
            raise ValueError(
                f"{tap.name} returned {z.dtype} {list(z.shape)} for a batch of {batch.shape[0]} x {batch.shape[1]} "
                "tokens, expected hidden states [B, L, F]; choose others by stack=, or batch_size=1 for a model that "
                "changes the number of tokens with padding"
            )
        if not batch.numbers:
            return
        z = z.detach().reshape(rows, z.shape[-1])
        wrong = None if tap.sums is None else tap.sums.add(z, batch.texts)
        if wrong is None and tap.matrix is not None:
            wrong = tap.matrix.add(z, batch.texts)
        if wrong is not None:
            raise ValueError(
                f"{tap.name} holds NaN or infinity in text {batch.first + batch.numbers[wrong]}, counted from 0; "
                "run the model in a wider dtype (model.float()), or look at its weights"
            )

    def end(self) -> None:
        batch = self.batch
        if batch is None:
            return
        if silent := [tap.name for tap in self.taps if not tap.calls]:
            raise ValueError(f"{', '.join(silent)} did not run in the model's forward; choose other layers or stack=")
        self.texts += len(batch.numbers)
        self.skipped += batch.shape[0] - len(batch.numbers)
        self.tokens += batch.texts.order.numel()
        self.batch = None

    def numbers(self) -> list[int]:
        return [tap.number for tap in self.taps if tap.sums is not None and tap.name != FINAL_NORM]

    def result(self, name: str, initialised: bool, options: dict[str, Any]) -> Condensation:
        if not self.texts:
            raise ValueError(
                f"texts has no text of at least two tokens, which a pair takes ({self.skipped} shorter ones were "
                "skipped); give longer ones"
            )
        layers = []
        for tap in self.taps:
            if tap.sums is None:
                continue
            text_means, content_means = zip(*tap.sums.text_means, strict=True)
            # Each text has a pair.
            all_tokens = cast(CosineStatistics, tap.sums.cosines(False, mean_interval(text_means)))
            content_tokens = tap.sums.cosines(True, mean_interval(content_means))
            layers.append(Layer(tap.name, all_tokens, content_tokens, *tap.sums.geometry()))
        blocks = [tap for tap in self.taps if tap.sums is not None and tap.name not in (EMBEDDING, FINAL_NORM)]
        means = np.array([[mean for mean, _ in tap.sums.text_means] for tap in blocks if tap.sums is not None])
        matrices = [tap.matrix for tap in self.taps if tap.matrix is not None]
        return Condensation(
            model=name,
            initialised=initialised,
            layers=tuple(layers),
            trend=trend_of(means.reshape(len(blocks), self.texts), [tap.number for tap in blocks]),
            texts=self.texts,
            tokens=self.tokens,
            skipped=self.skipped,
            options=options,
            published=published_measurement(matrices) if matrices else None,
        )


EMBEDDING, FINAL_NORM = "embedding", "final norm"


# ---- hidden states


def _of_hidden_states(hidden: Any, mask: Tensor | None, layers: Layers, published: bool) -> Run:
    states = layers_of(hidden, "model")
    first = states[0]
    for number, z in enumerate(states, 1):
        if z.dim() not in (2, 3) or not z.is_floating_point() or z.shape[:-1] != first.shape[:-1]:
            raise ValueError(
                f"hidden states must be floating point [B, L, F] or [L, F] of the same B and L, got {z.dtype} "
                f"{list(z.shape)} as layer {number} and {list(first.shape)} as layer 1"
            )
    shape = (1, first.shape[0]) if first.dim() == 2 else (first.shape[0], first.shape[1])
    if mask is None:
        mask = torch.ones(shape, dtype=torch.bool, device="cpu")
    else:
        check_tensor("mask", mask, "boolean with one entry a token", "give torch.as_tensor(mask)")
        if mask.dtype != torch.bool or mask.shape != first.shape[:-1]:
            raise ValueError(
                f"mask must be boolean {list(first.shape[:-1])}, as the hidden states without their features, got "
                f"{mask.dtype} {list(mask.shape)}"
            )
        mask = mask.reshape(shape).cpu()
    texts, numbers = select_texts(mask, _without_first(mask))
    chosen = layer_numbers(layers, len(states))
    taps = [Tap(f"layer {n}", n, LayerSums(), AveragedMatrix() if published else None) for n in chosen]
    run = Run(taps)
    run.begin(_Batch({}, texts, shape, 0, numbers))
    for tap in taps:
        run.measure(tap, states[tap.number - 1])
    run.end()
    return run


def _without_first(mask: Tensor) -> Tensor:
    """``mask`` ``[B, L]`` without each row's first token."""
    return mask & (mask.long().cumsum(1) > 1)


# ---- models


class MeasuredModel:
    """Model with the module that is called and the stack of blocks that is measured."""

    def __init__(self, model: nn.Module, stack: str | None) -> None:
        if stack is not None and not isinstance(stack, str):
            raise TypeError(f"stack must be the name of a stack of blocks, or a part of it, got {stack!r}")
        config = getattr(model, "config", None)
        self.both = bool(getattr(config, "is_encoder_decoder", False))
        self.stack: Stack = find_stack(model, "encoder" if self.both and stack is None else stack)
        self.is_decoder = self.both and ".decoder." in f".{self.stack.name}."
        # Without the head, whose logits would take most of the memory.
        head_free = is_pretrained(self.stack.owner) and not self.is_decoder
        self.called = self.stack.owner if head_free else getattr(model, "base_model", model) if self.both else model
        self.model = model
        self.names = list(inspect.signature(self.called.forward).parameters)
        parameter = next(model.parameters(), None)
        self.device = torch.device("cpu") if parameter is None else parameter.device

    @property
    def takes_mask(self) -> bool:
        return "attention_mask" in self.names

    def at_most(self, max_length: int) -> int:
        """``max_length``, or the model's context where that is shorter."""
        config = getattr(self.model, "config", None)
        sizes = [getattr(config, key, None) for key in ("max_position_embeddings", "n_positions", "context")]
        return min([max_length, *(size for size in sizes if isinstance(size, int) and size > 1)])

    def run(self, layers: Layers, final_norm: bool, published: bool) -> Run:
        """Measurement with a tap for each chosen layer, and for each layer of the published procedure."""
        count = len(self.stack.blocks)
        chosen = _numbers(layers, count)
        has_norm = self._norm() is not None
        if final_norm and not has_norm:
            raise ValueError(
                "final_norm=True needs a model of Hugging Face or a GPT2 of this package, whose final norm is known; "
                f"{type(self.model).__name__} is neither"
            )
        taps = []
        for number in [*range(count + 1), None]:
            is_last = number == count or number is None
            sums = final_norm if number is None else number in chosen
            # The published procedure takes the last hidden state behind the norm in place of that before it.
            matrix = published and (not is_last or has_norm == (number is None))
            if sums or matrix:
                name = FINAL_NORM if number is None else f"block {number}" if number else EMBEDDING
                depth = count + 1 if number is None else number
                taps.append(Tap(name, depth, LayerSums() if sums else None, AveragedMatrix() if matrix else None))
        return Run(taps)

    def _norm(self) -> nn.Module | None:
        """Module whose output begins with the last hidden state behind the final norm; None where it is unknown."""
        if isinstance(self.model, GPT2):
            return self.model.ln_f
        return self.stack.owner if is_pretrained(self.stack.owner) and not self.is_decoder else None

    @contextlib.contextmanager
    def evaluating(self, run: Run) -> Iterator[None]:
        """Context with hooks on the layers, in evaluation mode without gradients; what was before is restored."""
        handles = []
        for tap in run.taps:
            if tap.name == EMBEDDING:
                hook = _before(run, tap)
                handles.append(self.stack.blocks[0].register_forward_pre_hook(hook, with_kwargs=True))
            else:
                norm = self._norm() if tap.name == FINAL_NORM else None
                module = norm or self.stack.blocks[tap.number - 1]
                handles.append(module.register_forward_hook(_after(run, tap)))
        training = {module: module.training for module in self.model.modules()}
        try:
            self.model.eval()
            with torch.no_grad():
                yield
        finally:
            for module, was in training.items():
                module.training = was
            for handle in handles:
                handle.remove()

    def __call__(self, inputs: dict[str, Tensor] | Tensor) -> None:
        if isinstance(inputs, Tensor):
            self.called(inputs.to(self.device))
            return
        given = {key: value.to(self.device) for key, value in inputs.items() if key in self.names}
        if self.is_decoder:  # the text is read by both stacks
            given.setdefault("decoder_input_ids", given["input_ids"])
            if "attention_mask" in given:
                given.setdefault("decoder_attention_mask", given["attention_mask"])
        if "input_ids" in inputs and "input_ids" not in self.names:
            self.called(inputs["input_ids"].to(self.device))
        elif "use_cache" in self.names:
            self.called(**given, use_cache=False)
        else:
            self.called(**given)


def _after(run: Run, tap: Tap) -> Callable[..., None]:
    def hook(module: nn.Module, args: object, output: Any) -> None:
        run.measure(tap, hidden_states_of(output, tap.name))

    return hook


def _before(run: Run, tap: Tap) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))
        run.measure(tap, hidden_states_of(given, "the input of block 1"))

    return hook


def _numbers(layers: Layers, count: int) -> list[int]:
    """Numbers of the chosen layers: 0 for the embedding, and blocks from 1."""
    if isinstance(layers, str):
        return [*([0] if layers == "all" else []), *layer_numbers(layers, count)]
    if not isinstance(layers, Iterable):
        raise TypeError(f"layers must be 'all' or a list of numbers, got {layers!r}; give layers=[{layers!r}]")
    numbers = list(layers)
    if not numbers:
        raise ValueError("layers is an empty list; give at least one layer, or layers='all'")
    embedding = [0] if any(type(n) is int and n == 0 for n in numbers) else []
    return embedding + layer_numbers([n for n in numbers if not (type(n) is int and n == 0)], count)


# ---- texts


class Reading:
    """Batches from texts, or from batches as given."""

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        add_special_tokens: bool,
        special_ids: Iterable[int] | None,
        batch_size: int,
    ) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.add_special_tokens, self.batch_size = add_special_tokens, batch_size
        self.skipped = 0
        if special_ids is not None and (isinstance(special_ids, str | bytes) or not isinstance(special_ids, Iterable)):
            raise TypeError(f"special_ids must be a list of token ids, got {special_ids!r}")
        self.special_ids = _special_ids(tokenizer) if special_ids is None else {int(i) for i in special_ids}

    def batches(self, texts: Any, model: MeasuredModel) -> Iterator[_Batch]:
        if texts is None:
            raise TypeError("texts is missing; give a list of strings, or of batches of token ids")
        if isinstance(texts, str | bytes | Tensor | Mapping) or not isinstance(texts, Iterable):
            kind = "Tensor" if isinstance(texts, Tensor) else type(texts).__name__
            raise TypeError(f"texts must be a list of strings, or of batches of token ids, got one {kind}; give [it]")
        waiting: list[list[int]] = []
        first, number = 0, 0
        for item in texts:
            if isinstance(item, str):
                ids = self._ids(item, number, model.at_most(self.max_length))
                # Without a mask, texts of another length would read the padding.
                differs = waiting and not model.takes_mask and len(ids) != len(waiting[0])
                if len(waiting) == self.batch_size or differs:
                    yield self._padded(waiting, first, model)
                    waiting, first = [], number
                waiting.append(ids)
                number += 1
                continue
            if waiting:
                raise TypeError(f"texts mixes strings and batches: item {number} is {type(item).__name__}; give either")
            batch = self._given(item, number)
            yield batch
            number += batch.shape[0]
            first = number
        if waiting:
            yield self._padded(waiting, first, model)

    def _ids(self, text: str, number: int, length: int) -> list[int]:
        if self.tokenizer is None:
            raise ValueError(
                "texts holds strings, and tokenizer is missing; give the model's, as "
                "AutoTokenizer.from_pretrained(name), or texts as token ids"
            )
        if hasattr(self.tokenizer, "all_special_ids"):
            encoded = self.tokenizer(
                text, truncation=True, max_length=length, add_special_tokens=self.add_special_tokens
            )["input_ids"]
        elif hasattr(self.tokenizer, "encode") and hasattr(self.tokenizer, "get_added_tokens_decoder"):
            encoded = self.tokenizer.encode(text, add_special_tokens=self.add_special_tokens).ids[:length]
        elif callable(self.tokenizer):
            encoded = self.tokenizer(text)[:length]
        else:
            raise TypeError(
                f"tokenizer must be one of transformers or of tokenizers, or a function from text to a list of ids, "
                f"got {type(self.tokenizer).__name__}"
            )
        try:
            return [int(i) for i in encoded]
        except (TypeError, ValueError) as error:
            raise TypeError(f"tokenizer gave {encoded!r:.60} for text {number}, expected a list of ids") from error

    def _padded(self, waiting: list[list[int]], first: int, model: MeasuredModel) -> _Batch:
        length = max(1, *map(len, waiting))
        ids = torch.zeros(len(waiting), length, dtype=torch.int64, device="cpu")
        mask = torch.zeros(len(waiting), length, dtype=torch.bool, device="cpu")
        for row, tokens in enumerate(waiting):
            ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
            mask[row, : len(tokens)] = True
        return self._batch({"input_ids": ids, "attention_mask": mask.long()}, ids, mask, first)

    def _given(self, item: Any, first: int) -> _Batch:
        inputs: dict[str, Tensor] | Tensor
        if isinstance(item, Mapping):
            inputs = {key: value for key, value in item.items() if isinstance(value, Tensor)}
            if "input_ids" not in inputs:
                raise ValueError(f"batch {first} of texts has {sorted(item)} and no tensor input_ids; add it")
            tokens, attended = inputs["input_ids"], inputs.get("attention_mask")
        elif isinstance(item, Tensor):
            inputs = tokens = item
            attended = None
        else:
            raise TypeError(
                f"item {first} of texts is {type(item).__name__}, expected a string, a tensor of token ids, or a "
                "mapping with input_ids; give torch.as_tensor(ids)"
            )
        if tokens.dim() == 1 and not tokens.is_floating_point():
            inputs = tokens[None] if isinstance(inputs, Tensor) else {k: v[None] for k, v in inputs.items()}
            tokens, attended = tokens[None], None if attended is None else attended[None]
        if tokens.dim() != (3 if tokens.is_floating_point() else 2):
            raise ValueError(
                f"item {first} of texts has shape {list(tokens.shape)} and {tokens.dtype}, expected ids [B, L], or "
                "inputs [B, L, F] in floating point"
            )
        if attended is not None and attended.shape != tokens.shape[:2]:
            raise ValueError(
                f"attention_mask of item {first} of texts has shape {list(attended.shape)}, expected "
                f"{list(tokens.shape[:2])}, as its input_ids"
            )
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool) if attended is None else attended.bool().cpu()
        return self._batch(inputs, tokens, mask, first)

    def _batch(self, inputs: dict[str, Tensor] | Tensor, tokens: Tensor, mask: Tensor, first: int) -> _Batch:
        content = _without_first(mask)
        if self.special_ids and not tokens.is_floating_point():
            special = torch.tensor(sorted(self.special_ids), dtype=torch.int64, device="cpu")
            content &= ~torch.isin(tokens.cpu(), special)
        texts, numbers = select_texts(mask, content)
        return _Batch(inputs, texts, (mask.shape[0], mask.shape[1]), first, numbers)


def _special_ids(tokenizer: Any) -> set[int]:
    if hasattr(tokenizer, "all_special_ids"):
        return {int(i) for i in tokenizer.all_special_ids}
    if hasattr(tokenizer, "get_added_tokens_decoder"):
        return {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    return set()


def _progress(batches: Iterator[_Batch], texts: Any, shown: bool) -> Iterator[_Batch]:
    """``batches`` under a progress bar, of texts where their number is known."""
    if not shown:
        yield from batches
        return
    try:
        from tqdm import tqdm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the progress bar needs tqdm: pip install tqdm, or give progress=False",
            name=error.name,
        ) from error
    total = len(texts) if hasattr(texts, "__len__") and len(texts) and isinstance(texts[0], str) else None
    with tqdm(total=total, unit=" texts", disable=None) as bar:
        for batch in batches:
            yield batch
            bar.update(batch.shape[0])


def check_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
