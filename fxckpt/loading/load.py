"""``load``: put a checkpoint back into the live objects of a run, or weights into a model for inference.

Nothing live is touched before the record and the layout were checked, and no byte before its chunk was verified. What has
something to lose is touched only after a first pass has verified every chunk of every file.

A step of the journal is its checkpoint and the steps behind it, made again (``made_again``). Where one of them cannot be made,
the step before it is what is there: the row of records is cut, and tried again in its place among all others.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fxckpt.compat.modules import Models
from fxckpt.compat.ranks import world_size
from fxckpt.compat.spread import is_spread, shard_again
from fxckpt.config import disabled
from fxckpt.errors import Corrupt, NoCheckpoint
from fxckpt.loading import apply, made_again
from fxckpt.loading.agreed import Choosing, agreement_for
from fxckpt.loading.exchange import is_worth_it, read_by_all
from fxckpt.loading.gathered import records_of
from fxckpt.loading.match import check_match, match_tensors, relaid
from fxckpt.loading.phases import Phases
from fxckpt.loading.replicated import kept_here, replication_of
from fxckpt.loading.schema import check_encoded, decode
from fxckpt.loading.settings import say_what_changed
from fxckpt.loading.target import Optimizers, StrPath, Target, find_target
from fxckpt.ranks import Agreement, Key
from fxckpt.run import extra_state
from fxckpt.run.run import Run
from fxckpt.store import names
from fxckpt.store.about import imported, known_as, origin
from fxckpt.store.identity import check_begun
from fxckpt.store.journaled import Broken, Journaled, Loadable, cut_off, journaled, step_of
from fxckpt.store.reader import Candidate, Reader, candidates, directory_of, read_record, records
from fxckpt.store.record import Record

log: logging.Logger = logging.getLogger("fxckpt")

_LOOKS = 10  # times that a store is looked at while a trainer takes back what was found there

Found = Candidate | Corrupt | Journaled
Skipped = list[tuple[str, str]]


@dataclass(frozen=True)
class Restored:
    """What ``load`` did.

    Attributes:
        step: ``opt.step()`` attempts so far; 0 if there was no checkpoint.
        iteration: turns of ``fxckpt.steps`` so far, else ``step``.
        epoch: epochs of ``fxckpt.epochs`` that were complete.
        batch: batches of the pass over ``fxckpt.batches`` that were behind.
        updates: steps that were applied: ``step`` less those that a GradScaler skipped.
        path: the checkpoint, or the record of the journal; None if there was none.
        layers: names of the layers restored.
        missing: live names that the checkpoint lacks.
        unexpected: names in the checkpoint that nothing live has.
        skipped: newer checkpoints that did not verify, each with the reason.
        imported: what the store began with (``fxckpt import``); None if it began with training.
    """

    step: int = 0
    iteration: int = 0
    updates: int = 0
    path: Path | None = None
    layers: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    epoch: int = 0
    batch: int = 0
    imported: str | None = None


@torch.inference_mode(False)  # what is made here is trained, wherever it was called
def load(
    dir: StrPath | None = None,
    *,
    model: Models | None = None,
    optimizer: Optimizers | None = None,
    extra: Mapping[str, object] | None = None,
    step: int | None = None,
    name: str | None = None,
    strict: bool = True,
) -> Restored:
    """Restore the newest verified checkpoint, in place.

    Without arguments: of the run that ``compile_step`` registered, into its model, optimizers and extras; before the first
    forward or later, compiled or not. With ``dir`` and ``model`` only: weights for inference.

    Where torch.distributed runs several ranks, each with a store of its own, all of them load the newest step that every rank
    has and that verifies on every rank; all must call it, equally often.

    Every chunk is verified before a byte of it is used. A run that has not stepped yet is read in one pass; whatever holds
    something of value (a run that has trained, a model without a run) is only touched after the whole checkpoint verified.

    Args:
        dir: the store; by default that of the run.
        model: what to load weights into, or whose names to use for ``optimizer``, as ``compile_step`` takes it; by default the
            run's.
        optimizer: one, or several in the order given to ``compile_step``; needed if several runs are live.
        extra: as given to ``compile_step``; by default what was given there.
        step, name: ask for a certain checkpoint, by its step or the name of a named save.
        strict: False: load what fits and list the rest.

    Returns:
        ``Restored``; its ``step`` is 0 when there is no checkpoint yet.

    Raises:
        LayoutMismatch: the model, optimizer or extras differ from the checkpoint.
        Corrupt: the checkpoint asked for, or every one there is, does not verify.
        NoCheckpoint: no such step or name, or a trainer took back each one that was found.
        RanksDisagree: the ranks have no step in common, or one of them is dead.
        NotAStore: the directory holds something else.
        SetupError: several runs are live, nothing says what to load into, or this is one of several ranks without a process
            group.
    """
    if disabled():
        log.warning("fxckpt is off (FXCKPT_DISABLE=1): nothing was loaded")
        return Restored()
    target, directory = find_target(dir, model, optimizer, extra)
    if target.run is not None:
        target.run.prepare_load()
    check_begun(os.path.abspath(directory))
    skipped: Skipped = []
    if (agreement := agreement_for(target, step is not None or name is not None)) is not None:
        return _load_agreed(agreement, target, directory, step, name, strict, skipped)
    for _ in range(_LOOKS):
        found = candidates(directory)
        chosen = _choose([*found, *_steps_of_journal(directory, found, step, skipped, target)], step, name, directory)
        with contextlib.suppress(NoCheckpoint):  # taken back meanwhile; there are newer ones now
            restored = _first_whole(chosen, target, strict, skipped, fall_back=step is None and name is None)
            break
    else:
        raise NoCheckpoint(f"{directory}: the checkpoints were taken back by the trainer while they were read, again and again")
    if restored is not None:
        return restored
    if skipped:
        why = "none of its checkpoints verifies:" + "".join(f"\n  {path}: {reason}" for path, reason in skipped)
        if target.run is not None and target.run.status.partially_loaded is not None:
            why += ("\nThe model now holds parts of a corrupt checkpoint and this run takes no step with it: build the model, "
                    "the optimizer and the run anew to start over.")  # fmt: skip
        raise Corrupt(directory, why)
    return _start_fresh(target, directory)


def _start_fresh(target: Target, directory: str) -> Restored:
    """There is no checkpoint, and the run may begin."""
    log.info("fxckpt: no checkpoint in %r yet: a fresh start", directory)
    if target.run is not None:
        target.run.mark_loaded(directory, None)
        target.run.capture.restart()
    return Restored()


def _load_agreed(
    agreement: Agreement, target: Target, directory: str, step: int | None, name: str | None, strict: bool, skipped: Skipped
) -> Restored:
    """Restore what all ranks agreed on, in the life that begins with it."""
    out: list[Restored] = []

    def look() -> Sequence[Found]:
        found = candidates(directory, of_all=False)
        rows = [] if alone else _steps_of_journal(directory, found, step, skipped, target, of_all=False)
        steps = [at for row in rows for at in (row.steps() if isinstance(row, Journaled) and step is None else [row])]
        return _choose([*found, *steps], step, name, directory)

    def restore(phases: Phases) -> None:
        if found is None:
            out.append(_start_fresh(target, directory))
            return
        with phases.sending():
            out.append(_restore(found, target, strict, skipped, agreement.rank, phases, choosing.verifies))

    replication = replication_of(target, directory, name)
    alone = target.run is not None and target.run.store.part[1] == 1  # each has a store of its own
    with agreement:
        kept = kept_here(replication, step, lambda each: saved_amid_an_iteration(each.record))
        at_stake = _untrained(target, strict) is None
        choosing = Choosing(agreement, look, kept, replication, target, directory, skipped, at_stake)
        while True:
            chosen = choosing.newest()
            found = chosen.found
            if choosing.restored(found, restore):
                break
    if found is not None:
        _say_how_many(found, agreement.world)
        _settle_sums(found, target, agreement)
    if alone:
        newest = max((each.record.step for each in records(directory) if isinstance(each, Candidate)), default=0)
        if newest > (behind := 0 if found is None else found.record.step):
            _say_what_is_not_made_again(directory, behind, newest, "ranks with a store each go on from full checkpoints")
    if (run := target.run) is not None:
        loaded: tuple[Key, int | None] | None = None
        if found is not None and os.path.realpath(directory) == os.path.realpath(run.directory):
            loaded = known_as(found.record), found.record.generation
            if names.is_replica(str(found.path)):  # of another store: what this one has is not continued
                loaded = known_as(found.record), None
                run.store.mark_loaded(None)
        run.saver.ranks.begin(chosen.begins, agreement.store, agreement.rank, agreement.world, loaded, chosen.safe)
    return out[-1]


def _settle_sums(found: Loadable, target: Target, agreement: Agreement) -> None:
    """All ranks have restored: have gradients summed as they were, if the checkpoint is of as many ranks."""
    summed = found.record.state.get("early", {}).get("summed")  # the same on all: DDP takes rank 0's
    if target.run is not None and summed is not None and found.record.world_size == agreement.world:
        target.run.arrangement.settle_sums(summed)


def _say_how_many(found: Loadable, world: int) -> None:
    """Say that there are more ranks now, or fewer."""
    if (wrote := found.record.world_size) != world:
        log.warning("fxckpt: %s was written by %d rank%s, and %d go%s on from it: random generators, loaders and buffers are "
                    "those of the rank of this number; where there was none, generators are seeded anew, the rest is rank 0's: "
                    "this is no bit-exact continuation", found.path, wrote, "s" if wrote > 1 else "", world,
                    "es" if world == 1 else "")  # fmt: skip


def _seed(record: Record, rank: int) -> int:
    """Where the generators begin of a rank that wrote none of its own."""
    text = f"{record.store_id}/{record.step}/{rank}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def _steps_of_journal(
    directory: str,
    found: Sequence[Candidate | Corrupt],
    step: int | None,
    skipped: Skipped,
    target: Target,
    of_all: bool = True,
) -> list[Found]:
    """Of each checkpoint the last step that its records lead to, and where ``step`` is asked for, that one. What they do not
    lead to is said, as far as it is newer than what they do. Not ``of_all``: rank 0's records are enough, as in ``found``."""
    listed = records(directory, of_all)
    every = journaled(found, listed)
    lost = cut_off(every, listed)
    rows = [each for each in every if _lies_as_written(each, target)]
    if others := [each for each in every if each not in rows]:
        newest_other = max(others, key=_generation)
        why = "ranks that hold the same parts of tensors as those that wrote it make its steps again, and here are others"
        _say_what_is_not_made_again(directory, newest_other.base.record.step, newest_other.record.step, why)
    if step is None:
        there = [each.record for each in [*rows, *found] if not isinstance(each, Corrupt)]
        newest, last = (max((getattr(each, of) for each in there), default=-1) for of in ("step", "generation"))
        left = {str(each.path) for each in listed if isinstance(each, Candidate) and each.record.generation < last}
        for each in (each for each in lost if directory_of(each) not in left):  # what a rollback left behind is no loss
            if (step_of(each) or 0) > newest and (entry := (directory_of(each), str(each))) not in skipped:
                log.error("fxckpt: %s; looking for an older step", each)
                skipped.append(entry)
        return list(rows)
    asked: list[Found] = [each for row in rows for each in row.steps() if each.record.step == step]
    return asked or [each for each in lost if step_of(each) == step]


def _lies_as_written(row: Journaled, target: Target) -> bool:
    """Has this rank of each tensor all, or just the part, that a rank had which wrote the journal? A kernel may round otherwise
    where a tensor ends, so steps made again on other parts need not have the same bits."""
    base = row.base.record
    try:
        base = read_record(str(row.base.path)) if base.parts else base
    except (Corrupt, NoCheckpoint):
        return True  # whoever loads it finds that, and looks for an older one
    if not base.is_sharded and not any(map(is_spread, target.inventory.trained.values())):
        return True
    return base.world_size == world_size() and relaid(match_tensors(base, target), base) is None


def _say_what_is_not_made_again(directory: str, step: int, newest: int, why: str) -> None:
    """A journal that is there is not gone through, behind this step."""
    what = "fxckpt: what the journal in %s has behind step %d, up to step %d, is not made again: %s"
    log.warning(what, directory, step, newest, why)


def _choose(found: Sequence[Found], step: int | None, name: str | None, directory: str) -> Sequence[Found]:
    """Those to try, in order: all, newest first, or the newest of the step or name that was asked for. Damaged records lie where
    their steps say. Raises NoCheckpoint if there is none of that step or name, saying what there is."""
    if step is None and name is None:
        ordered = _newest_first(found)
        return sorted(ordered, key=lambda each: not isinstance(each, Corrupt) and saved_amid_an_iteration(each.record))
    chosen = [each for each in found if _is_meant(each, step, name, directory)]
    if not chosen:
        whole = [each for each in found if not isinstance(each, Corrupt)]
        there = ", ".join(str(each.record.name or each.record.step) for each in whole) or "none"
        asked = f"of step {step}" if name is None else f"named {name!r}"
        raise NoCheckpoint(f"{directory}: no checkpoint {asked}; there is: {there}")
    newest = max(chosen, key=_generation)
    for each in chosen:
        if isinstance(each, Corrupt) and each is not newest:
            log.warning("fxckpt: another checkpoint of step %s is damaged: %s", step, each)
    return [newest]


def _newest_first(found: Sequence[Found]) -> list[Found]:
    """Steps of the journal among checkpoints that are newest first, damaged ones too."""
    out: list[Found] = [each for each in found if not isinstance(each, Journaled)]
    for row in sorted((each for each in found if isinstance(each, Journaled)), key=_generation):
        later = (i for i, each in enumerate(out) if not isinstance(each, Corrupt) and _generation(each) < _generation(row))
        out.insert(next(later, len(out)), row)
    return out


def saved_amid_an_iteration(record: Record) -> bool:
    """A run goes on from a boundary if it can: these come last."""
    found: object = record.state  # not checked yet
    for name in ("early", "loops", "amid"):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found is True


def _is_meant(each: Found, step: int | None, name: str | None, directory: str) -> bool:
    """Is it of this step and name? Of a damaged record, its directory tells."""
    if not isinstance(each, Corrupt):
        return step in (None, each.record.step) and name in (None, each.record.name)
    at = os.path.relpath(directory_of(each), os.path.abspath(directory))
    return at == os.path.join(names.NAMED, name) if name is not None else names.step_of(at, None) == step


def _generation(each: Found) -> int:
    """Of a damaged record, its directory's name tells if it was not the first of its step."""
    if not isinstance(each, Corrupt):
        return each.record.generation
    found = names.generation_of(os.path.basename(directory_of(each)))
    return -1 if found is None else found


def _first_whole(chosen: Sequence[Found], target: Target, strict: bool, skipped: Skipped, fall_back: bool) -> Restored | None:
    """Restore the first one that verifies; None if none does. The others are added to ``skipped``, unless no older one is
    to be taken in their place: then Corrupt is raised. Raises NoCheckpoint if one is taken back meanwhile."""
    left = list(chosen)
    while left:
        found, broken = left.pop(0), None
        try:
            if isinstance(found, Corrupt):
                raise found
            restored = _restore(found, target, strict, skipped)
            if target.run is not None and isinstance(found, Candidate):
                _say_how_many(found, world_size())
            return restored
        except Broken as error:
            broken, why = error, error.error
        except Corrupt as error:
            why = error
        if not fall_back:
            raise why
        log.error("fxckpt: %s; looking for an older checkpoint", why)
        at = directory_of(why) if isinstance(found, Journaled) else str(found.path)
        if (entry := (at, str(why))) not in skipped:
            skipped.append(entry)
        if isinstance(found, Journaled):
            left = _without(found, broken, left)
    return None


def _without(found: Journaled, broken: Broken | None, left: Sequence[Found]) -> list[Found]:
    """What is left to try when a step of the journal was ``broken``: the steps before it. If it was not, its checkpoint is
    damaged."""
    if broken is None:
        return [each for each in left if each is not found.base]
    shorter = found.cut(broken.good)
    return _newest_first([*left, shorter]) if shorter is not None else list(left)


def _mixture(target: Target, untrained: Run | None, always: bool) -> contextlib.AbstractContextManager[None]:
    """Around what leaves live tensors that must not be trained if it does not come to its end: the one reading of a checkpoint;
    steps made again, whose result is compared with what training had only when they were made; and what another rank may end."""
    run = target.run if always else untrained
    return contextlib.nullcontext() if run is None else run.status.loading_at_once()


def _untrained(target: Target, strict: bool) -> Run | None:
    """The run, if all that a load may spoil has no value yet."""
    return target.run if strict and target.run is not None and target.run.clock.attempts == 0 else None


def _restore(
    found: Candidate | Journaled,
    target: Target,
    strict: bool,
    skipped: Skipped,
    rank: int = 0,
    phases: Phases | None = None,
    verified: bool = False,
) -> Restored:
    """Check, verify unless all of it was ``verified``, then apply one checkpoint, with the steps behind it, as this ``rank`` had
    it, in ``phases`` with others. Raises Corrupt, and Broken for one of these."""
    read = None if phases is None else records_of(found, phases)
    reader = Reader(found.path if isinstance(found, Candidate) else found.base.path, rank, read)
    journal = made_again.open_journal(found, rank, read) if isinstance(found, Journaled) else None
    path = str(reader.path / names.COMMIT)
    check_encoded(reader.record, path)
    match = match_tensors(reader.record, target)
    check_match(match, reader.record, target, strict)
    untrained = _untrained(target, strict)
    if untrained is None and not verified:  # something is at stake: look at all of it first
        reader.verify()
        made_again.verify(journal)
    before = decode(reader.record, reader.state_tensors(), path)
    saved, record = before, reader.record
    if journal is not None:
        saved, record = made_again.decoded(journal, reader.record), journal[-1].record
    if rank >= record.world_size:  # it wrote none: two ranks that draw the same numbers would train on one
        saved.early["random"] = extra_state.random_state_of(_seed(record, rank))
    apply.check_extras(saved, target)
    states = apply.make_states(before, match, target)
    tensors = dict(match.tensors)
    if journal is not None:
        tensors |= made_again.beside(reader, before, match, target)
    if target.run is not None and reader.record.world_size == world_size() and (name := relaid(match, reader.record)):
        log.warning("fxckpt: %s was written in another layout than the ranks have now (%s): sums of gradients are other ones, so "
                    "this is no bit-exact continuation", found.path, name)  # fmt: skip
    if target.model is not None:
        shard_again(target.model)
    shared = phases is not None and is_worth_it(reader, tensors, phases)
    with _mixture(target, untrained, journal is not None or phases is not None):
        read_by_all(reader, tensors, phases) if phases is not None and shared else apply.read_tensors(reader, tensors)
        if journal is not None:
            made_again.make(reader, journal, before, tensors)
        held = apply.read_later(reader, match.later)
        apply.set_buffers(match, target)
        if journal is not None:
            held |= made_again.set_what_is_whole(journal, target)
        if phases is not None:
            phases.all()
    apply.apply_optimizers(saved, states, match, target)
    apply.give_back_what_was_held(saved, match, target)
    apply.apply_extras(saved, target)
    if (run := target.run) is not None:
        apply.freeze(saved.early.get("frozen"), record.step, match, target)
        apply.set_modes(saved.early.get("eval"), record.step, target)
        apply.set_values(saved, run)
        if run.clock.attempts == 0:
            say_what_changed(saved, record.step, run)
        run.continue_from(record.step, record.updates, record.iteration)
        run.saver.about.continue_from(record, run.saver.stall_seconds())
        apply.apply_loops(saved, target, run)
        store = reader.path.parent if record.name is None else reader.path.parent.parent
        run.mark_loaded(store, record.generation)
        run.arrangement.expect(match.places)
        transient = {} if target.model is not None else {**saved.early["buffers"], **saved.early.get("remote", {})}
        run.late_owners = apply.LateOwners(held, transient, run.optimizers) if held or transient else None
    if skipped:
        log.warning("fxckpt: continuing from %s; newer ones did not verify", found.path)
    began = origin(record)
    if began is not None and imported(record) is not None:
        left = ["random generators", *([] if record.optimizers or not target.optimizers else ["optimizers"]), *match.missing]
        what = "fxckpt: began from import: step 0, from %s (%s). Not in it, so as the script made them: %s"
        log.info(what, began["source"], began["format"], ", ".join(left))
    else:
        log.info("fxckpt: restored step %d from %s", record.step, found.path)
    layers = tuple(layer.name for layer in record.layers)
    loops = saved.early.get("loops", apply.NO_LOOPS)
    return Restored(record.step, record.iteration, record.updates, found.path, layers, tuple(match.missing),
                    tuple(match.unexpected), tuple(skipped), loops["epoch"], loops["batch"],
                    None if began is None else began["source"])  # fmt: skip
