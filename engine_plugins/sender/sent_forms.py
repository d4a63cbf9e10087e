"""What a sender offers in another form than the trainer holds it, on all of its ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from engine_plugins.sender.ranks import TrainerRanks
from engine_plugins.weights.boxes.placement import SourceBox
from engine_plugins.weights.sources.forms.block_fp8 import BlockFp8
from engine_plugins.weights.sources.forms.block_fp8_form import quantized_form
from engine_plugins.weights.sources.forms.cast import Cast, SendDtype, sent_dtypes
from engine_plugins.weights.sources.forms.form_source import FormSource
from engine_plugins.weights.sources.forms.merged_lora import MergedLora
from engine_plugins.weights.sources.forms.shared_blocks import SharedBlocks

__all__ = ["SentForms"]


class SentForms:
    """The forms that a sender's options name.

    Args:
        boxes: gives this process's boxes anew for every update.
        ranks: of the trainer.
        quantization: how matrices are quantized; None leaves them as they are.
        send_dtype: see `SenderOptions`.
        merged: what adapters are merged into, beneath the other forms.

    Attributes:
        dtypes: those that tensors are sent in.
        slot_bytes: of each rank, bytes of its slots and copies after the last refresh.

    Raises:
        SettingsError: a form that does not exist.
        NotConfiguredError: the kernels for it are not installed.
    """

    def __init__(
        self,
        boxes: Callable[[], Sequence[SourceBox]],
        ranks: TrainerRanks,
        *,
        quantization: BlockFp8 | None,
        send_dtype: SendDtype,
        merged: MergedLora | None = None,
    ) -> None:
        others = quantization.others if isinstance(quantization, BlockFp8) else None
        self.dtypes = sent_dtypes(send_dtype, others)
        quantized = [] if quantization is None else [quantized_form(quantization)]
        self._source = FormSource(boxes, [*quantized, Cast(self.dtypes)])
        self._ranks, self._merged = ranks, merged
        self._measures = quantization is not None
        self.slot_bytes: list[int] = []

    def boxes(self) -> Sequence[SourceBox]:
        """This process's boxes as they are offered."""
        return self._source.boxes()

    def release(self) -> None:
        """Let go of the slots; the next refresh lays them out anew."""
        self._source.release()
        if self._merged is not None:
            self._merged.release()

    def refresh(self, offer: Callable[[], tuple[bool, int]]) -> list[int]:
        """Have the slots hold the weights as they are now; collective.

        Args:
            offer: offers the boxes anew, and says whether memory has moved, and how many bytes it
                holds besides because peers cannot read them where they lie.

        Returns:
            The places in the group of the ranks whose memory has moved.
        """
        measured: list[list[SharedBlocks]] = []
        if self._measures:
            measure = self._source.measure
            measured = self._ranks.agree("measuring shared blocks", measure, list[SharedBlocks])

        def refresh() -> tuple[int, bool]:
            self._source.settle(blocks for each in measured for blocks in each)
            moved, copied = offer()
            merged_bytes = 0 if self._merged is None else self._merged.nbytes
            return self._source.slot_bytes + merged_bytes + copied, moved

        told = self._ranks.agree("refreshing the weights", refresh, tuple[int, bool])
        self.slot_bytes = [slot_bytes for slot_bytes, _ in told]
        return [place for place, (_, moved) in enumerate(told) if moved]
