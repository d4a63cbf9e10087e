"""The trainer's side of a live weight update: one object, one call per version.

`WeightSender` registers the trainer's memory, tells every engine what lies where, and asks the
engines to fetch it. It gathers nothing: each process offers its own shards in place.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, Unpack

from torch import nn

from engine_plugins.admin_answers import PauseMode, UpdateRequest
from engine_plugins.sender.fleet import Engines
from engine_plugins.sender.job import Job
from engine_plugins.sender.joining import AddedEngines
from engine_plugins.sender.megatron_job import MegatronRanks
from engine_plugins.sender.options import SenderOptions
from engine_plugins.sender.recipes import (
    Boxes,
    Recipe,
    of_boxes,
    of_fsdp,
    of_hf,
    of_megatron,
)
from engine_plugins.sender.report import SenderReport
from engine_plugins.weights.sources.megatron.registry import GivenRules
from engine_plugins.weights.sources.torch_source import HfWeights

__all__ = ["WeightSender"]


class WeightSender:
    """Updates the weights of live engines from this trainer's memory.

    With torch.distributed initialised, creating it, `update` and `close` are collective: every
    rank calls them, and every rank returns the same report or raises the same error. The memory
    stays registered, and is read by engines only while `update` runs: where it cannot be known
    whether an engine still reads, the memory is taken back, and what is read then is refused.

    Use `from_hf`, `from_fsdp` or `from_megatron`; the constructor takes any source of boxes.

    Args:
        boxes: gives this process's boxes anew for every update.
        engines: base urls, `http://host:8000`.
        model: facts that engines compare with their own config; see `model_facts`.
        **options: see `SenderOptions`.

    Raises:
        SettingsError: an engine url that is none, or given twice; files for TLS that cannot be
            used; a fan_out below 1, or together with two phases; a push in one phase; a dtype or
            quantization that weights cannot be sent in.
        NotConfiguredError: NIXL is not installed.
        SourceError: tensors that cannot be offered.
        TransportError: memory that cannot be registered.
    """

    def __init__(
        self,
        boxes: Boxes,
        *,
        engines: Engines,
        model: Mapping[str, str | int | bool] | None = None,
        **options: Unpack[SenderOptions],
    ) -> None:
        self._job = Job(partial(of_boxes, boxes, model, options), engines, options)

    @classmethod
    def _made(cls, recipe: Callable[[], Recipe], engines: Engines, options: SenderOptions) -> Self:
        sender = cls.__new__(cls)
        sender._job = Job(recipe, engines, options)
        return sender

    @classmethod
    def from_hf(
        cls,
        weights: HfWeights,
        *,
        engines: Engines,
        config: object = None,
        merge_lora: bool = False,
        **options: Unpack[SenderOptions],
    ) -> Self:
        """Send an HF model, or HF-named tensors: whole ones, and of DTensors each rank's share.

        A transformers model is offered as `save_pretrained` would write it: its parameters and
        saved buffers, renamed, split and joined by transformers' own tables, as views.

        Args:
            weights: best the HF model itself, compiled or wrapped (DDP) or not; or a function
                that gives its named tensors: either is looked at anew for every update, so
                parameters that were replaced (`load_state_dict(assign=True)`) are followed. Of
                named tensors given once these very objects are sent: of `named_parameters()` a
                replaced `.data` is followed, and of a `state_dict()` nothing.
            engines: base urls, `http://host:8000`.
            config: the HF config, object, dict or path. A model has its own; of named tensors it
                says how transformers' names and fused experts become the checkpoint's.
            merge_lora: of a peft model, compute the weights that LoRA changes into memory of ours,
                with the adapters merged, anew for every update; the base model stays as it is.
                False refuses adapters that are not merged.
            **options: see `SenderOptions`.

        Raises:
            SourceError: nothing given, no model and no named tensors, tensors without values
                (offloaded), adapters that are not merged, or tensors beside the model's (a value
                head).
            UnsupportedError: a model wrapped by FSDP1, adapters other than plain LoRA, or tensors
                that are no views of what a checkpoint holds; otherwise as for the class.
        """
        recipe = partial(of_hf, weights, config, options, merge_lora=merge_lora)
        return cls._made(recipe, engines, options)

    @classmethod
    def from_fsdp(
        cls,
        model: nn.Module,
        *,
        engines: Engines,
        config: object = None,
        merge_lora: bool = False,
        **options: Unpack[SenderOptions],
    ) -> Self:
        """Send what this process holds of an FSDP2 model (HSDP, with tensor parallelism or not).

        The sharded parameters are looked up anew for every update, and read where they lie;
        modules that are unsharded are resharded first. Saved buffers are sent too.

        Args:
            model: the HF model that `fully_shard` was called on; compiled or with activation
                checkpointing or not.
            engines: base urls, `http://host:8000`.
            config: the HF config, object, dict or path; by default the model's own.
            merge_lora: as for `from_hf`; the adapters' shards are gathered for it.
            **options: see `SenderOptions`.

        Raises:
            UnsupportedError: a model wrapped by FSDP1; otherwise as for `from_hf`.
        """
        recipe = partial(of_fsdp, model, config, options, merge_lora=merge_lora)
        return cls._made(recipe, engines, options)

    @classmethod
    def from_megatron(
        cls,
        ranks: MegatronRanks,
        config: Any,
        *,
        engines: Engines,
        rules: GivenRules | None = None,
        **options: Unpack[SenderOptions],
    ) -> Self:
        """Send what this process holds of a Megatron model, in Megatron's own layout.

        What an optimizer with `overlap_param_gather` left to the next forward pass is gathered
        first, in every update. Of ranks built by hand this is the caller's to do.

        Which HF tensors a parameter holds is said by `rules`, then by the family's tables
        (`register_family` adds to these), then by Megatron-Bridge where the trainer has it loaded.

        Args:
            ranks: this process's share; its model chunks as modules, best as DDP wraps them; or
                several shares, for a process that plays many ranks.
            config: the HF config that the engines serve, object or dict.
            engines: base urls, `http://host:8000`.
            rules: for parameters that no table has, or has otherwise: see `register_family`.
            **options: see `SenderOptions`.
        """
        return cls._made(partial(of_megatron, ranks, config, rules, options), engines, options)

    def update(
        self,
        version: int,
        *,
        mode: Literal["auto", "staged", "in_place"] = "auto",
        pause: PauseMode = "keep",
        in_flight_kv: Literal["recompute", "keep"] = "recompute",
        flush: bool = True,
        resume: bool | None = None,
        timeout_s: float = 300.0,
        force: bool = False,
        verify: Literal["none", "sample", "full"] = "none",
        request_id: str | None = None,
    ) -> SenderReport:
        """Install the weights as they are now on every engine, as `version`.

        Collective. Returns or raises once no engine reads any more, or once the memory was taken
        back (also by Ctrl-C); the tensors may be written again then. Engines that restarted since
        the last update are told everything anew.

        Args:
            version: the training step, not below 0, the same on every rank, and newer than
                what the engines hold (or `force`).
            mode: staged keeps the old weights until commit, in_place does not.
            pause: what becomes of running requests: held, waited for, or aborted.
            in_flight_kv: whether held requests recompute their KV with the new weights.
            flush: empty the engines' caches.
            resume: let engines generate again afterwards; None leaves those that were paused
                before as they were.
            timeout_s: seconds that each engine may take.
            force: install even if the version is not newer.
            verify: how much of the installed bytes is checked.
            request_id: names this update; an engine answers a repeated one as it did before.

        Raises:
            EnginesFailedError: some engines failed; it says what each holds now, and has the
                reports of those that did not. Of those with code `update_end_unknown` nothing is
                known, and the memory was taken back; the next update offers it anew.
            SourceError: a tensor that can no longer be offered.
            SettingsError: a version or timeout that cannot be, or ranks that name different
                versions.
        """

        def request() -> UpdateRequest:
            return UpdateRequest(
                plan_id="",
                version=version,
                request_id=request_id or f"v{version}-{secrets.token_hex(8)}",
                mode=mode,
                verify=verify,
                pause=pause,
                in_flight_kv=in_flight_kv,
                flush=flush,
                resume=resume,
                timeout_s=timeout_s,
                force=force,
            )

        return self._job.update(request)

    def add_engines(self, engines: Engines, *, timeout_s: float = 300.0) -> AddedEngines:
        """Have further engines take updates; they hold the present version before this returns.

        They read it from an engine of this sender that holds it. Where none can give it, the
        answer says that they wait for the next update: the trainer's memory is not read for
        them, since nobody can know whether it was written since the last one.

        Collective, between updates. An engine that restarted under its url need not be added.

        Args:
            engines: base urls that this sender has not been given.
            timeout_s: seconds that each engine may take to read the version.

        Raises:
            SettingsError: a url that is none, or given before; then none is added.
            SourceError: this sender is closed.
        """
        return self._job.add_engines(engines, timeout_s)

    def remove_engines(self, engines: Engines) -> None:
        """Have engines take no further updates, such as ones that are gone.

        Each keeps what it holds. Collective, between updates; an engine may be added again.

        Args:
            engines: base urls that this sender was given.

        Raises:
            SettingsError: a url that this sender was not given; then none is removed.
            SourceError: this sender is closed.
        """
        self._job.remove_engines(engines)

    def release(self) -> None:
        """Let go of the memory between updates: of registrations, storages and our own slots.

        Call it before parameters are offloaded, freed in place or unmapped; the next update
        registers them anew. Each rank for itself; no update may be under way.
        """
        self._job.release()

    def close(self) -> None:
        """Take the memory back from the wire. Repeating it does nothing.

        Engines keep the weights that they have; their plans from this sender are void. What an
        engine reads at this moment it refuses.
        """
        self._job.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
