"""Conversion of masks, documents, packed sequences and subsamples to the form in which the backends take them.

Every backend takes ``z`` ``[B, L, F]``, optionally ``pair_ids`` ``[B, L]`` (int64: tokens of a row pair where their
pair ids are equal and not negative) and optionally ``cu_seqlens`` ``[S + 1]`` (with B = 1: tokens pair within segments
only). A *sequence* is a row, or a segment of ``cu_seqlens``, and has one loss.
"""

from __future__ import annotations

import functools
import warnings
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def make_pair_ids(mask: Tensor | None, document_ids: Tensor | None) -> Tensor | None:
    """``pair_ids`` ``[B, L]`` from a boolean mask (False: no pairs) and document ids (negative: no pairs)."""
    if document_ids is not None:
        pair_ids = document_ids.long()
        return pair_ids if mask is None else pair_ids.masked_fill(~mask, -1)
    return None if mask is None else mask.long() - 1


def sample_tokens(
    z: Tensor, pair_ids: Tensor | None, count: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor | None]:
    """``count`` tokens of each row of ``z``, ``[B, count, F]``, and their pair ids; drawn without replacement,
    independently per row.

    Tokens of a negative pair id are drawn only where a row has no others left.
    """
    keys = uniform(z.shape[0], z.shape[1], device=z.device, generator=generator)
    if pair_ids is not None:
        keys = keys - (pair_ids < 0).to(keys.dtype)
    chosen = keys.topk(count, dim=1).indices.sort(dim=1).values
    sampled = z.gather(1, chosen.unsqueeze(-1).expand(-1, -1, z.shape[2]))
    return sampled, None if pair_ids is None else pair_ids.gather(1, chosen)


def sample_packed_tokens(
    pair_ids: Tensor | None, cu_seqlens: Tensor, tokens: int, count: int, generator: torch.Generator | None
) -> Tensor:
    """``pair_ids`` ``[1, T]`` in which at most ``count`` tokens of each packed sequence take part.

    Tokens left out keep their place and get a negative pair id, because the lengths stay on the device.
    """
    device = cu_seqlens.device
    segment = segment_of_token(cu_seqlens, tokens)
    keys = uniform(tokens, device=device, generator=generator)
    if pair_ids is not None:
        keys = keys + (pair_ids[0] < 0).to(keys.dtype)
    # A token's position relative to the beginning of its segment is the rank of its key in the segment.
    order = order_of(segment, keys)
    position = torch.empty_like(order)
    position[order] = torch.arange(tokens, device=device)
    left_out = position - cu_seqlens.long()[segment] >= count
    pair_ids = torch.zeros(1, tokens, dtype=torch.int64, device=device) if pair_ids is None else pair_ids
    return pair_ids.masked_fill(left_out, -1)


def uniform(*shape: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Random fp32 numbers in [0, 1)."""
    if generator is None:  # torch.compile does not take generator=None where a dimension is dynamic
        return torch.rand(shape, dtype=torch.float32, device=device)
    return torch.rand(shape, dtype=torch.float32, device=device, generator=generator)


def segment_of_token(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Index ``[T]`` of the packed sequence of each token."""
    position = torch.arange(tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    # The clamp keeps indices valid for wrong bounds, whose error an accelerator reports later.
    return torch.searchsorted(cu_seqlens[1:].contiguous(), position, right=True).clamp_(max=cu_seqlens.numel() - 2)


def within_segments(pair_ids: Tensor | None, cu_seqlens: Tensor, tokens: int) -> Tensor:
    """``pair_ids`` ``[1, T]`` that differ between packed sequences, so that equal ids of two segments do not pair.

    Ids are made dense by sorting, because the user's ids may be as large as int64 allows.
    """
    segment = segment_of_token(cu_seqlens, tokens)
    if pair_ids is None:
        return segment[None]
    order, begins = _runs(segment, pair_ids[0])
    dense = torch.empty_like(order)
    dense[order] = begins.cumsum(0)
    return dense.masked_fill(pair_ids[0] < 0, -1)[None]


def _runs(sequence: Tensor, pair_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Order ``[N]`` of the tokens by sequence and then by pair id; and ``[N]``, in that order, whether the token is the
    first of its id."""
    order = order_of(sequence, pair_ids)
    ids, places = pair_ids[order], sequence[order]
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[1:] = (ids[1:] != ids[:-1]) | (places[1:] != places[:-1])
    return order, begins


def order_of(first: Tensor, second: Tensor) -> Tensor:
    """Order ``[N]`` that sorts by ``first`` and, among equals, by ``second``."""
    by_second = second.argsort(stable=True)
    return by_second[first[by_second].argsort(stable=True)]


def pair_id_counts(pair_ids: Tensor) -> Tensor:
    """Number ``[B, L]`` of tokens of the row with each token's pair id, the token included; 0 for a negative id."""
    pair_ids = pair_ids.contiguous()  # avoids a warning of searchsorted, which copies otherwise
    ordered = pair_ids.sort(dim=1).values
    counts = torch.searchsorted(ordered, pair_ids, right=True) - torch.searchsorted(ordered, pair_ids)
    return counts.masked_fill(pair_ids < 0, 0)


def check_cu_seqlens(cu_seqlens: Tensor, tokens: int, max_seqlen: int | None = None) -> None:
    """Raises where the bounds do not cut ``tokens`` tokens into sequences of at most ``max_seqlen``.

    An assertion on the device checks the bounds on an accelerator, because reading them would synchronise.
    """
    if cu_seqlens.device.type == "cpu":
        if not ((cu_seqlens[0] == 0) & (cu_seqlens[-1] == tokens) & (cu_seqlens.diff() >= 0).all()):
            values = cu_seqlens.tolist()
            shown = values if len(values) <= 16 else f"{values[:8]} ... {values[-8:]}"
            raise ValueError(
                f"cu_seqlens is {shown}; it must start at 0, never decrease and end at the number of tokens "
                f"({tokens}): the cumulative lengths, torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()"
            )
        if max_seqlen is not None and (longest := longest_sequence(cu_seqlens)) > max_seqlen:
            raise ValueError(
                f"max_seqlen is {max_seqlen}, and the longest sequence of cu_seqlens has {longest} tokens; give that"
            )
        return
    lengths = cu_seqlens.diff()
    fit = lengths >= 0 if max_seqlen is None else (lengths >= 0) & (lengths <= max_seqlen)
    valid = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == tokens) & fit.all()
    # PyTorch takes at most 254 characters.
    longer = "" if max_seqlen is None else f", or has a sequence longer than max_seqlen, {max_seqlen}"
    torch._assert_async(valid, f"cu_seqlens does not go from 0 up to the number of tokens ({tokens}){longer}")


def longest_sequence(cu_seqlens: Tensor) -> int:
    """Length of the longest sequence; the values are read."""
    return int(cu_seqlens.diff().max()) if cu_seqlens.numel() > 1 else 0


def on_device(cu_seqlens: Tensor, device: torch.device) -> Tensor:
    """``cu_seqlens`` on ``device``. Bounds on the CPU are copied once for all calls with the same values, forward and
    backward: each copy from the CPU would wait for the stream, and cannot be captured in a CUDA graph."""
    real = type(cu_seqlens) is Tensor and not torch.compiler.is_compiling() and not is_in_torch_dispatch_mode()
    if cu_seqlens.device == device or device.type == "cpu" or not cu_seqlens.is_cpu or not real:
        return cu_seqlens.to(device)
    # The values are the key of the cache: the caller may write to the tensor between two calls.
    return _copy(cu_seqlens.numpy().tobytes(), cu_seqlens.dtype, device).on_current_stream()


class _Copy:
    """Device copy of bounds that :func:`on_device` keeps, and the event after which other streams may read it."""

    def __init__(self, values: Tensor, device: torch.device) -> None:
        self.copied: torch.cuda.Event | None = None
        if device.type != "cuda":
            self.values = values.to(device)
            return
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "cu_seqlens is on the CPU, and a CUDA graph that is being captured cannot copy it: call once with the "
                "same cu_seqlens before the capture, or give it on the device of z"
            )
        self.values = values.pin_memory().to(device, non_blocking=True)
        self.copied = torch.cuda.Event()
        self.copied.record(torch.cuda.current_stream(device))

    def on_current_stream(self) -> Tensor:
        if not self.values.is_cuda:
            return self.values
        if torch.cuda.is_current_stream_capturing():  # capture begins with a synchronisation, so that the copy is done
            _IN_GRAPHS.add(self)
            return self.values
        stream = torch.cuda.current_stream(self.values.device)
        self.values.record_stream(stream)
        if self.copied is not None:
            if self.copied.query():
                self.copied = None
            else:
                self.copied.wait(stream)
        return self.values


# Copies that CUDA graphs read at every replay; kept for the life of the process.
_IN_GRAPHS: set[_Copy] = set()


@functools.lru_cache(maxsize=64)
def _copy(values: bytes, dtype: torch.dtype, device: torch.device) -> _Copy:
    return _Copy(torch.frombuffer(bytearray(values), dtype=dtype), device)


class HostSegments(NamedTuple):
    """Runs of tokens that all pair with each other, as the CPU kernel takes them; tensors are int64."""

    rows: Tensor | None
    """``[N]``: row of the flattened ``z`` of each token of the runs; None where token i is row i."""
    begins: Tensor
    """``[R]``: first token of each run."""
    ends: Tensor
    """``[R]``: one past the last token of each run."""
    sequence: Tensor
    """``[R]``: sequence of each run, never decreasing."""
    sequences_with_pairs: int
    """Number of sequences that have a run of at least two tokens."""


def host_segments(batch: int, length: int, pair_ids: Tensor | None, cu_seqlens: Tensor | None) -> HostSegments:
    """Runs of tokens that pair, from ``pair_ids`` ``[B, L]`` and ``cu_seqlens`` ``[S + 1]`` on the CPU."""
    if pair_ids is None:
        if cu_seqlens is None:
            return _whole_rows(batch, length)
        bounds = cu_seqlens.long()
        return _host_segments(None, bounds[:-1], bounds[1:], torch.arange(bounds.numel() - 1, device="cpu"))
    if cu_seqlens is None:
        sequence = torch.arange(batch, device="cpu").repeat_interleave(length)
    else:
        sequence = segment_of_token(cu_seqlens, length)
    ids = pair_ids.flatten()
    taking_part = (ids >= 0).nonzero().flatten()
    order, first = _runs(sequence[taking_part], ids[taking_part])
    rows = taking_part[order]
    begins = first.nonzero().flatten()
    ends = torch.cat([begins[1:], begins.new_full((min(1, begins.numel()),), rows.numel())])
    return _host_segments(rows, begins, ends, sequence[rows][begins])


@functools.lru_cache(maxsize=64)
def _whole_rows(batch: int, length: int) -> HostSegments:
    """Runs that are the rows. Cached, because a training loop asks for the same shape in every step, for a few
    microseconds each."""
    sequence = torch.arange(batch, device="cpu")
    return _host_segments(None, sequence * length, (sequence + 1) * length, sequence)


def _host_segments(rows: Tensor | None, begins: Tensor, ends: Tensor, sequence: Tensor) -> HostSegments:
    with_pairs = sequence[ends - begins > 1].unique_consecutive().numel()
    if with_pairs == 0:
        warn_of_no_pair()
    return HostSegments(rows, begins, ends, sequence, with_pairs)


@functools.cache
def warn_of_no_pair() -> None:
    """Warns, once per process, that no two tokens pair. Called only where the host knows this without waiting for the
    mask on an accelerator."""
    warnings.warn(
        "the dispersion loss met no two tokens that pair, so that it is 0 and has no gradient: are all sequences of "
        "one token, is mask False, or is every token a document of its own in document_ids or cu_seqlens? (Said once.)",
        stacklevel=2,
    )
