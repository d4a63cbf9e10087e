"""The trainer's side of a live weight update: one object, one call per version.

`WeightSender` registers the trainer's memory, tells every engine what lies where, and asks the
engines to fetch it. It gathers nothing: each process offers its own shards in place.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, Unpack

import msgspec
from torch import nn

from engine_plugins.admin_answers import PauseMode, UpdateRequest
from engine_plugins.errors import SettingsError, SourceError, UpdateEndUnknownError
from engine_plugins.sender.access import EngineAccess
from engine_plugins.sender.engines import EngineLink, links_to
from engine_plugins.sender.megatron_job import MegatronRanks, Place, check_topology
from engine_plugins.sender.offer import TrainerOffer
from engine_plugins.sender.options import MEET_TIMEOUT_S, SenderOptions, Ways
from engine_plugins.sender.progress import progress_of
from engine_plugins.sender.push_report import PushReport
from engine_plugins.sender.ranks import TrainerRanks
from engine_plugins.sender.recipes import (
    Boxes,
    Recipe,
    of_boxes,
    of_fsdp,
    of_hf,
    of_megatron,
)
from engine_plugins.sender.report import EnginesFailedError, SenderReport
from engine_plugins.sender.rounds import Round, checked_version
from engine_plugins.sender.send_dtype import EngineDtypes
from engine_plugins.sender.sent_forms import SentForms
from engine_plugins.sender.update_rounds import UpdateRounds
from engine_plugins.weights.contract.version_word import new_word
from engine_plugins.weights.sources.megatron.registry import GivenRules
from engine_plugins.weights.sources.torch_source import HfWeights

__all__ = ["WeightSender"]

Engines = str | Sequence[str]


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
        self._begin(partial(of_boxes, boxes, model, options), engines, options)

    @classmethod
    def _made(cls, recipe: Callable[[], Recipe], engines: Engines, options: SenderOptions) -> Self:
        sender = cls.__new__(cls)
        sender._begin(recipe, engines, options)
        return sender

    def _begin(
        self, recipe: Callable[[], Recipe], engines: Engines, options: SenderOptions
    ) -> None:
        """Meet the other ranks first: whatever fails after that is told to all of them."""
        self._access = EngineAccess.of(options)
        self._progress = options.get("progress")
        self._ways = Ways.of(options)
        self._rounds: UpdateRounds | None = None
        self._links: dict[str, EngineLink] = {}
        timeout_s = options.get("meet_timeout_s", MEET_TIMEOUT_S)
        usable = isinstance(timeout_s, int | float) and timeout_s > 0  # else refused later
        self._ranks = TrainerRanks(
            options.get("process_group"), meet_timeout_s=timeout_s if usable else MEET_TIMEOUT_S
        )
        self._closing = ExitStack()
        """Each is closed, last first, whatever the others raise."""
        self._closing.callback(self._ranks.close)
        self._closing.callback(self._close_links)
        try:
            with self._ranks.together("making the sender"):
                read = partial(self._read, recipe, options)
                self._ranks.agree("reading the model", read, list[Place], judge=_one_topology)
                self._ranks.agree("registering the weights", partial(self._open, engines), None)
        except BaseException:  # an interrupt too must leave nothing registered
            self.close()
            raise

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
        request = UpdateRequest(
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
        return self._update(request)

    def add_engines(self, engines: Engines) -> None:
        """Have further engines take the updates from the next one on.

        Collective, between updates. An engine that restarted under its url need not be added.

        Args:
            engines: base urls that this sender has not been given.

        Raises:
            SettingsError: a url that is none, or given before; then none is added.
        """
        self._ranks.agree("adding engines", partial(self._add_engines, engines), None)

    def release(self) -> None:
        """Let go of the memory between updates: of registrations, storages and our own slots.

        Call it before parameters are offloaded, freed in place or unmapped; the next update
        registers them anew. Each rank for itself; no update may be under way.
        """
        self._offer.release()

    def close(self) -> None:
        """Take the memory back from the wire. Repeating it does nothing.

        Engines keep the weights that they have; their plans from this sender are void. What an
        engine reads at this moment it refuses.
        """
        self._rounds = None
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _update(self, request: UpdateRequest) -> SenderReport:
        # Also the barrier: nothing is copied or read while a rank still computes its step.
        told = self._ranks.agree(
            "starting the update", lambda: (checked_version(request), new_word()), tuple[int, int]
        )
        asked, word = [version for version, _ in told], told[0][1]
        if len(set(asked)) > 1:
            raise SettingsError(f"the trainer's ranks ask for different versions: {asked}")
        started = time.perf_counter()
        self._gather()
        self._refresh(word)
        result = self._run(msgspec.structs.replace(request, source_word=word))
        if result.failures:
            raise EnginesFailedError(
                version=request.version,
                failures=result.failures,
                reports=result.reports,
                fed_by=result.fed_by,
            )
        # The leading rank's clock, so that the report is the same everywhere.
        seconds = self._ranks.lead("timing", lambda: time.perf_counter() - started, float)
        return SenderReport.of(
            request.version,
            result.reports,
            result.plans,
            seconds,
            fed_by=result.fed_by,
            push=None if self._offer.push is None else PushReport.of(self._offer.push.costs),
            slot_bytes=self._forms.slot_bytes,
        )

    def _run(self, request: UpdateRequest) -> Round:
        """Have the engines take the weights; afterwards no engine reads what it may install."""
        try:
            result = self._open_rounds().run(request)
        except BaseException:  # Ctrl-C too: engines may be reading
            self._revoke()
            raise
        unknown = UpdateEndUnknownError.code
        if any(failure.code == unknown for failure in result.failures.values()):
            self._revoke()
        else:
            self._offer.withdraw()
            self._release_if_asked()
        return result

    def _release_if_asked(self) -> None:
        if self._ways.register == "every_update":
            self._offer.release()

    def _revoke(self) -> None:
        """Take the memory back, and let no thread that still speaks with an engine go on."""
        self._offer.close()
        for url, link in list(self._links.items()):
            link.client.close()
            self._links[url] = EngineLink(self._access.client(url))

    def _add_engines(self, engines: Engines) -> None:
        added = links_to(engines, self._access)
        known = [link.url for link in added if link.url in self._links]
        if known:
            for link in added:
                link.client.close()
            raise SettingsError(
                f"engines were given before: {known}", remedy="add only those that are new"
            )
        self._links |= {link.url: link for link in added}

    def _gather(self) -> None:
        """Gather what the optimizer left to the next forward pass.

        Every rank looks before any gathers: one that refuses would leave the others waiting.
        """
        gathers = self._recipe.gathers
        if gathers is None:
            return
        found: list[Callable[[], None]] = []
        look = partial(gathers, self._ranks.members)
        self._ranks.agree("looking at the parameters", lambda: found.extend(look()), None)
        self._ranks.agree("gathering the parameters", lambda: _call_all(found), None)

    def _refresh(self, word: int) -> None:
        """Offer the weights as they are now; once more if the engines want other dtypes."""
        self._forms.refresh(lambda: self._open_rounds().refresh(word))

    def _read(self, recipe: Callable[[], Recipe], options: SenderOptions) -> list[Place]:
        """Work out what is sent."""
        self._recipe = recipe()
        self._forms = SentForms(
            self._recipe.boxes,
            self._ranks,
            quantization=self._recipe.form,
            send_dtype=options.get("send_dtype", "engine"),
            merged=self._recipe.merged,
        )
        self._offer = TrainerOffer(
            self._forms.boxes,
            self._ranks,
            model=self._recipe.model,
            transport=options.get("transport"),
            pushes=self._ways.direction == "push",
            let_go=self._forms.release,
        )
        self._offer.lets_go_of(self._recipe.forget)
        self._closing.callback(self._offer.close)
        return list(self._recipe.places())

    def _open(self, engines: Engines) -> None:
        self._links = {link.url: link for link in links_to(engines, self._access)}
        self._ways.check()
        self._offer.reach([link.host for link in self._links.values()])
        self._offer.open()
        self._release_if_asked()
        self._rounds = UpdateRounds(
            self._ranks,
            self._links,
            self._ways,
            self._offer,
            model=self._recipe.model,
            dtypes=EngineDtypes(self._ranks, self._forms.dtypes),
            again=self._refresh,
            shown=partial(progress_of, access=self._access, shown=self._progress),
        )

    def _close_links(self) -> None:
        with ExitStack() as stack:
            for link in self._links.values():
                stack.callback(link.client.close)

    def _open_rounds(self) -> UpdateRounds:
        if self._rounds is None:
            raise SourceError("this sender is closed", remedy="make a new one")
        return self._rounds


def _one_topology(told: Sequence[Sequence[Place]]) -> None:
    check_topology([place for told_by_one in told for place in told_by_one])


def _call_all(steps: Sequence[Callable[[], None]]) -> None:
    for step in steps:
        step()
