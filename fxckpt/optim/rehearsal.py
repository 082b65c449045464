"""Split the step of an optimizer that is not of ``torch.optim``, where that can be shown to change nothing.

Before each step the optimizer's own ``step()`` runs on stand-ins without memory (graph/tape.py), one for each *part*:
parameters of one group whose states and counts are alike. What it does in Python, advancing ``group["step"]`` or a
``state["step"]``, happens on a copy of the optimizer and is taken over; what it asks of PyTorch becomes the parts'
programs. So the numbers of every step are computed by the optimizer's own code.

A program runs only after it was shown to be right:

* all parameters were rehearsed at once, and each asks for the same with the same numbers as its part's one stand-in;
* nothing else changed: no attribute, no module global, no class attribute, no random generator;
* in two steps the whole stock step ran on the real tensors, and left in each of them the bits that the programs left in
  copies of them.

Whatever fails makes the optimizer run its own step whole, for good; so does anything new that fails later.
"""

from __future__ import annotations

import collections
import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from fxckpt.compat import cuda
from fxckpt.compat.optimizers import inner_hooks, plain_class, stock_step
from fxckpt.compat.tracing import watched
from fxckpt.graph.update.hoist import Program
from fxckpt.graph.update.trace import MakesState, NotTraceable, is_count
from fxckpt.optim import effects, tape, values
from fxckpt.optim.calls import Inputs, calls_for

if TYPE_CHECKING:
    from fxckpt.optim.stepper import BoundParam

log = logging.getLogger("fxckpt")

PROOFS = 2
"""Steps in which programs are compared with the optimizer's own step before they take its place."""

MOST = 64
"""Tapes that one optimizer may have. More come from a step that never does the same again, and each is compared anew."""

_OURS = {"state", "param_groups", "step", "_fxckpt_handle", "grad_scale", "found_inf"}


@dataclass
class Part:
    """Members of one group whose update is the same code with the same numbers; ``members`` of an absent part have no
    gradient in this step, and are there because the step's code may look."""

    group: int
    members: list[BoundParam]
    position: int  # of its first member among the group's parameters
    present: bool
    stand_in: tape.StandIn = None  # type: ignore[assignment]
    state: dict[str, Any] = field(default_factory=dict)  # the first member's: what is no tensor, as it was set last

    @property
    def first(self) -> BoundParam:
        """Whose counts and shapes stand for all."""
        return self.members[0]


@dataclass
class Role:
    """What one stand-in did in one rehearsal."""

    tape: tape.Tape
    scalars: list[Any]
    plain: dict[str, Any]  # the values of its state that are no tensors
    counts: dict[str, torch.Tensor]


@dataclass
class Found:
    """What one rehearsal showed."""

    roles: list[Role]
    groups: list[dict[str, Any]]  # the entries of each group that changed
    by_shape: bool


class Cast:
    """A part with its program, in the place of ``updates.ScalarGroup``: its scalars come from the rehearsal."""

    compiled = False

    def __init__(self, index: int, part: Part, program: Program):
        self.index, self.group, self.part, self.program = index, part.group, part, program
        self.role: Role = None  # type: ignore[assignment]
        self.columns = {key: [m.state[key] for m in part.members] for key in _counts(part.first)}

    def scalars(self, group: dict[str, Any]) -> list[Any]:
        """Advance the counts of all members; returns this step's numbers."""
        for key, column in self.columns.items():
            torch._foreach_copy_(column, [self.role.counts[key]] * len(column))
        return self.role.scalars


class Rehearsal:
    """The rehearsals of one optimizer. ``refused``: why it runs whole, for good; ``proven``: some steps are split."""

    def __init__(self, opt: torch.optim.Optimizer):
        self.opt = opt
        self.refused: str | None = None
        self.by_shape = False  # a part must not hold parameters of different shapes
        self._proofs: dict[Any, int] = {}  # steps in which a tape was compared, see _situation
        self._compared: set[int] = set()  # parameters that took part in a comparison
        self._identities: set[int] = set()
        self._reach: effects.Reach | None = None
        self._comparing = False
        self._excuse: tuple[str, list[torch.Tensor]] | None = None  # a refusal in what may be a first step, and of whom
        self._closure_first: bool | None = None
        self._members: Sequence[BoundParam] = ()
        self._mask: list[Any] = []
        self._parts: list[Part] = []
        self._stand_ins: dict[Any, list[tape.StandIn]] = {}
        self._programs: dict[Any, Program] = {}
        self._casts: list[Cast] = []
        self._pending: tuple[list[Part], Found, Any] | None = None

    @property
    def proven(self) -> bool:
        """Has a step been split?"""
        return any(count >= PROOFS for count in self._proofs.values())

    def refuse(self, reason: str) -> None:
        """Run whole from now on."""
        self.refused = reason
        log.debug("%s is not split: %s", plain_class(self.opt).__name__, reason)

    def _refuse_or_wait(self, reason: str, members: Sequence[BoundParam]) -> None:
        """Refuse, unless this may be a first step: what makes states is another code than what uses them."""
        new = [m.param for m in members if not m.state]
        if new:
            self._excuse = reason, new
        else:
            self.refuse(reason)

    def _end_waiting(self) -> None:
        """Was the step that could not be rehearsed the first one of all whom it was excused for?"""
        if self._excuse is not None:
            reason, params = self._excuse
            self._excuse = None
            if not all(self.opt.state.get(p) for p in params):
                self.refuse(reason)

    # -- a step -----------------------------------------------------------------------------------------------------

    def takes_closure_first(self, members: Sequence[BoundParam]) -> bool:
        """Does the step call its closure once and before all else, so that it may as well have been called before?"""
        self._end_waiting()
        if self._closure_first is None and self.refused is None:
            closure = _Closure()
            try:
                stateful = [True if m.state else None for m in members]
                mask = stateful if any(stateful) else [True] * len(members)
                parts = self._partition(members, mask, False)
                self._act([(p, p.stand_in) for p in parts], closure)
            except MakesState:
                return False  # its first step, which is its own
            except Exception as error:
                self._refuse_or_wait(_why(error), [m for m, on in zip(members, mask) if on])
                return False
            self._closure_first = True
        return bool(self._closure_first) and self.refused is None

    def prepare(self, members: Sequence[BoundParam], same: bool, closure: bool) -> list[Cast] | None:
        """Rehearse the step that is about to run, and take over what it did in Python. None: it must run whole.

        ``same``: no count was changed by anything but our own steps since the last call. The same list of casts comes back
        as long as nothing but numbers changed.
        """
        self._pending = None
        self._end_waiting()
        if self.refused is not None:
            return None
        gradients = [m.param.grad for m in members]
        if any(g is not None and (g.layout != torch.strided or type(g) is not torch.Tensor) for g in gradients):
            return None
        mask = [None if g is None else (g.dtype, g.stride() if self.by_shape else None) for g in gradients]
        try:
            parts, found = self._rehearse(members, mask, same, closure)
            situation = self._situation(parts, found)
            new = any(id(m.param) not in self._compared for p in parts if p.present for m in p.members)
            if new or any(self._proofs.get(each, 0) < PROOFS for each in situation):
                if len(self._proofs) > MOST:
                    raise NotTraceable(f"it asked for {len(self._proofs)} different sequences of operators")
                self._compare_all(members, parts, found, closure)
                self._pending = parts, found, situation
                return None
        except MakesState:
            return None
        except Exception as error:  # NotTraceable, or what nobody thought of: training goes on, and it is said
            self._refuse_or_wait(_why(error), [m for m, on in zip(members, mask) if on])
            return None
        self._take_over(parts, found)
        return self._cast(parts, found)

    def _rehearse(self, members: Sequence[BoundParam], mask: list[Any], same: bool, closure: bool) -> tuple[list[Part], Found]:
        """One stand-in for each part; by shape if the step looks at shapes."""
        for _ in range(2):
            parts = self._partition(members, mask, same)
            found = self._act([(p, p.stand_in) for p in parts], _Closure() if closure else None)
            if not found.by_shape or self.by_shape:
                return parts, found
            self.by_shape, same = True, False
        raise AssertionError("unreachable: by_shape is set")

    @staticmethod
    def _situation(parts: Sequence[Part], found: Found) -> set[tuple[tape.Tape, bool]]:
        """What has to be proven for this step: each tape, alone in its group or beside a part that does the same."""
        used = collections.Counter((p.group, role.tape) for p, role in zip(parts, found.roles) if p.present)
        return {(noted, count > 1) for (_, noted), count in used.items()}

    def _take_over(self, parts: Sequence[Part], found: Found) -> None:
        """What the step did in Python, in the optimizer's own groups and states."""
        for group, changed in zip(self.opt.param_groups, found.groups):
            for key, value in changed.items():
                values.assign(group, key, value)
        for part, role in zip(parts, found.roles):
            for key, value in role.plain.items():
                if part.state[key] is not value:
                    part.state[key] = value
                    for member in part.members:
                        member.state[key] = value

    def _cast(self, parts: Sequence[Part], found: Found) -> list[Cast]:
        """The parts that take part, with their programs; the same list while programs and parts are the same."""
        present = [(p, r) for p, r in zip(parts, found.roles) if p.present]
        programs = [self._program(p, r) for p, r in present]
        kept = [(c.part, c.program) for c in self._casts]
        if len(kept) != len(present) or any(a is not c or b is not d for (a, b), (c, _), d in zip(kept, present, programs)):
            self._casts = [Cast(i, p, program) for i, ((p, _), program) in enumerate(zip(present, programs))]
        for cast, (_, role) in zip(self._casts, present):
            cast.role = role
        return self._casts

    def _program(self, part: Part, role: Role) -> Program:
        key = role.tape, part.first.param.dtype, part.first.param.device
        if key not in self._programs:
            self._programs[key] = tape.program_of(part.stand_in, plain_class(self.opt))
            log.debug(
                "noted %s (%s): %d operators, %d scalars, inputs %s",
                plain_class(self.opt).__name__,
                part.first.param.dtype,
                len(role.tape),
                self._programs[key].scalars,
                self._programs[key].inputs,
            )
        return self._programs[key]

    # -- parts ------------------------------------------------------------------------------------------------------

    def _partition(self, members: Sequence[BoundParam], mask: list[Any], same: bool) -> list[Part]:
        """Put alike members together; kept while nothing that decides it has changed. ``mask``: None without a gradient."""
        if (
            same
            and members is self._members
            and mask == self._mask
            and all(m.state[key] is value for p in self._parts for key, value in p.state.items() for m in p.members)
        ):
            return self._parts
        if extra := [k for k in self.opt.state if not isinstance(k, torch.Tensor)]:
            raise NotTraceable(f"it keeps state {extra[0]!r} that belongs to no parameter")
        self._refuse_aliases(members)
        self._casts = []
        counts = cuda.count_values([[m.state[k] for k in _counts(m)] for m in members])
        parts: dict[Any, Part] = {}
        places: dict[int, int] = {}
        for member, present, counted in zip(members, mask, counts):
            place = places[member.group] = places.get(member.group, -1) + 1
            key = (member.group, *self._kind(member), counted) if present else (member.group,)
            if key not in parts:
                parts[key] = Part(member.group, [], place, present)
            parts[key].members.append(member)
        used: dict[Any, int] = {}
        for part in parts.values():
            part.state = _plain(part.first)
            kind = self._shape(part.first, part.present)
            number = used[kind] = used.get(kind, -1) + 1
            pool = self._stand_ins.setdefault(kind, [])
            if number == len(pool):
                pool.append(_stand_in(part.first, part.present))
            part.stand_in = pool[number]
        self._members, self._mask, self._parts = members, mask, list(parts.values())
        return self._parts

    def _refuse_aliases(self, members: Sequence[BoundParam]) -> None:
        """Raises NotTraceable for tensors that are the same memory: no two stand-ins are."""
        tensors = [t for m in members for t in (m.param, *(t for _, t, _ in m.items)) if t.numel()]
        tensors += [m.param.grad for m in members if m.param.grad is not None and m.param.grad.numel()]
        if len({t.data_ptr() for t in tensors}) != len(tensors):
            raise NotTraceable("two of its tensors, states or gradients, are the same memory")
        self._identities = {id(m.param) for m in members}

    def _kind(self, member: BoundParam) -> tuple:
        """Two members of one kind may be one part: what the step's code can see of them is the same."""
        plain = tuple((key, type(value), value) for key, value in _plain(member).items())
        return (*self._shape(member, True), plain) if self.by_shape else (*_types(member), plain)

    def _shape(self, member: BoundParam, present: bool) -> tuple:
        """All that a stand-in is made of."""
        tensors = [
            member.param,
            *([member.param.grad] if present and member.param.grad is not None else []),
            *(t for _, t, _ in member.items),
        ]
        return (*_types(member), present, *((tuple(t.shape), t.stride()) for t in tensors))

    # -- rehearsing -------------------------------------------------------------------------------------------------

    def _act(self, players: Sequence[tuple[Part, tape.StandIn]], closure: _Closure | None) -> Found:
        """Run the optimizer's own step on a copy of it that holds stand-ins. Raises NotTraceable."""
        if self._reach is None:
            self._reach = effects.reach(self.opt)
        clone, attributes = self._clone()
        memo: dict[int, Any] = {}
        groups = [{k: values.copy(v, memo) for k, v in g.items() if k != "params"} for g in self.opt.param_groups]
        counts = [{key: part.first.state[key].clone() for key in _counts(part.first)} for part, _ in players]
        states = []
        for (part, stand_in), copies in zip(players, counts):
            held = part.first.state or {}
            states.append({k: copies.get(k, stand_in.tensors.get(k, v)) for k, v in held.items()})
        for index, group in enumerate(groups):
            group["params"] = [s.param for p, s in players if p.group == index]
            if "param_names" in group:
                group["param_names"] = [group["param_names"][p.position] for p, _ in players if p.group == index]
        clone.param_groups = groups
        clone.state = collections.defaultdict(dict)
        clone.state.update({s.param: dict(state) for (part, s), state in zip(players, states) if part.first.state is not None})
        recorder = tape.Recorder([s for _, s in players])
        for (_, stand_in), copies in zip(players, counts):
            stand_in.begin()
            for tensor in copies.values():
                recorder.add_count(tensor, stand_in)
        self._run(clone, recorder, closure)
        self._check_attributes(clone, attributes)
        return Found(
            [self._role(clone, part, s, state, copies) for (part, s), state, copies in zip(players, states, counts)],
            self._changed(groups),
            recorder.peeked or recorder.sized,
        )

    def _run(self, clone: Any, recorder: tape.Recorder, closure: _Closure | None) -> None:
        step = stock_step(self.opt)
        try:
            if closure is not None:
                closure.recorder = recorder
            proving = not self.proven or self._comparing
            with (
                effects.none_outside(self.opt, self._reach) if proving else contextlib.nullcontext(),
                watched(recorder.called, recorder.dispatched),
            ):
                returned = step(clone) if closure is None else step(clone, closure)
        except NotTraceable:
            raise
        except Exception as error:  # whatever the optimizer's own code does with a stand-in
            said = (str(error).strip().splitlines() or [""])[0]
            if "dynamo-optimized function" in said:
                raise NotTraceable("it calls a function that torch.compile made") from error
            raise recorder.refusal or NotTraceable(f"{type(error).__name__}: {said[:160]}") from error
        if recorder.refusal is not None:
            raise recorder.refusal
        if closure is not None and closure.calls != 1:
            raise NotTraceable(f"it called its closure {closure.calls} times")
        if returned is not (None if closure is None else closure.loss):
            raise NotTraceable("it returns something else than the closure's loss")

    def _clone(self) -> tuple[Any, dict[str, Any]]:
        """A copy of the optimizer without groups and state, and the attributes that it must have afterwards."""
        if inner_hooks(self.opt):
            raise NotTraceable("hooks are registered, which a step inside its step would call")
        own, memo = vars(self.opt), {}
        kept = {k: v for k, v in own.items() if k not in _OURS and not k.startswith("_optimizer_")}
        for name, value in kept.items():
            values.refuse_objects(name, value, self._identities)
        clone = object.__new__(plain_class(self.opt))
        vars(clone).update({k: values.copy(v, memo) for k, v in kept.items()})
        for name in (k for k in own if k.startswith("_optimizer_")):
            vars(clone)[name] = collections.OrderedDict()
        return clone, kept

    @staticmethod
    def _check_attributes(clone: Any, before: dict[str, Any]) -> None:
        """Only groups and states may change: a checkpoint holds no attributes. Raises NotTraceable."""
        now = {k: v for k, v in vars(clone).items() if k not in _OURS and not k.startswith("_optimizer_")}
        if changed := [k for k in {**before, **now} if k not in before or k not in now or not values.same(before[k], now[k])]:
            raise NotTraceable(f"it changes its attribute {changed[0]!r}")

    def _role(
        self, clone: Any, part: Part, stand_in: tape.StandIn, before: dict[str, Any], counts: dict[str, torch.Tensor]
    ) -> Role:
        """What one stand-in did. Raises MakesState or NotTraceable where its state is not what it was made of."""
        after = dict(clone.state.get(stand_in.param, {}))
        if list(after) != list(before):
            raise MakesState(f"its step makes state {sorted(map(str, set(after) ^ set(before)))}")
        plain = {}
        for key, value in after.items():
            if isinstance(before[key], torch.Tensor) or isinstance(value, torch.Tensor):
                if value is not before[key]:
                    raise NotTraceable(f"it replaces its state {key!r}")
            else:
                plain[key] = _plain_value(key, value)
        noted = stand_in.tape()
        if not part.present and (noted or not values.same(plain, _plain(part.first))):
            raise NotTraceable("it changes parameters that have no gradient")
        return Role(noted, stand_in.scalars, plain, counts)

    def _changed(self, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The entries of each group that the step changed. Raises NotTraceable for what no record could hold."""
        out = []
        for before, after in zip(self.opt.param_groups, groups):
            skipped = {"params", "param_names"}
            if gone := [k for k in before if k not in after]:
                raise NotTraceable(f"it removes {gone[0]!r} from its parameter group")
            changed = {k: v for k, v in after.items() if k not in skipped and (k not in before or not values.same(before[k], v))}
            for key, value in changed.items():
                if not values.is_plain(value):
                    raise NotTraceable(f"it keeps a {type(value).__name__} in its parameter group ({key!r})")
            out.append(changed)
        return out

    # -- proof ------------------------------------------------------------------------------------------------------

    def _compare_all(self, members: Sequence[BoundParam], parts: Sequence[Part], found: Found, closure: bool) -> None:
        """Rehearse with a stand-in for each parameter, and three at least for each part. Raises NotTraceable if one of them
        does something else than its part's, or if something changes that no step may change."""
        players, roles = [], []
        owner = {id(m): (part, role) for part, role in zip(parts, found.roles) for m in part.members}
        for member in members:
            part, role = owner[id(member)]
            for _ in range(3 - len(part.members) if member is part.first and part.present and len(part.members) < 3 else 1):
                alone = Part(part.group, [member], part.position, part.present, state=_plain(member))
                players.append((alone, _stand_in(member, part.present)))
                roles.append(role)
        self._comparing = True
        try:
            all_of_them = self._act(players, _Closure() if closure else None)
        finally:
            self._comparing = False
        if all_of_them.by_shape and not self.by_shape:
            self.by_shape = True
            raise MakesState("")  # this step runs whole; the next one is rehearsed by shape
        if not values.same(all_of_them.groups, found.groups):
            raise NotTraceable("what it keeps in its parameter group depends on how many parameters there are")
        for role, other in zip(roles, all_of_them.roles):
            if other.tape != role.tape or not values.same(values.numbers(other.scalars), values.numbers(role.scalars)):
                raise NotTraceable("it treats parameters differently that look alike")
            after, expected = ((r.plain, values.numbers(r.counts.values())) for r in (other, role))
            if not values.same(after, expected):
                raise NotTraceable("it counts steps differently for parameters that look alike")

    @contextlib.contextmanager
    def compared(self, members: Sequence[BoundParam]) -> Iterator[None]:
        """Around a whole step: does it do what the programs would have done? Nothing to compare, nothing is done."""
        pending, self._pending = self._pending, None
        if pending is None:
            yield
            return
        parts, found, situation = pending
        name = plain_class(self.opt).__name__
        try:
            expected = self._foresee(parts, found)
        except Exception as error:
            self.refuse(f"its operators cannot run again: {type(error).__name__}: {error}")
            yield
            return
        yield
        if not values.same(self._observe(parts), expected):
            self.refuse("a rehearsal of it does not end with the bits that its step ends with")
            return
        self._compared |= {id(m.param) for p in parts if p.present for m in p.members}
        for each in situation:
            self._proofs[each] = self._proofs.get(each, 0) + 1
        log.debug(
            "rehearsed %s: %d parts, %d of %d comparisons with its own step done",
            name,
            len(parts),
            min(self._proofs[each] for each in situation),
            PROOFS,
        )

    def _foresee(self, parts: Sequence[Part], found: Found) -> list[Any]:
        """Digests of everything after the step, by the programs, on copies: one member at a time, for its memory."""
        casts = self._cast(parts, found)
        scalars = [cast.role.scalars for cast in casts]
        after: dict[int, list[Any]] = {}
        with torch.no_grad():
            for cast in casts:
                for member in cast.part.members:
                    twin = member.twin()
                    for key, count in cast.role.counts.items():
                        twin.state[key].copy_(count)
                    if twin.state is not None:
                        twin.state.update(cast.role.plain)
                    for call in calls_for([twin], {twin.name: cast.index}, casts):
                        call(Inputs(scalars, {twin.index: twin.param.grad}))
                    after[id(member)] = _digests(twin)
        out: list[Any] = [after.get(id(m)) or _digests(m) for part in parts for m in part.members]
        self._casts = []
        return [
            *out,
            [
                {k: values.copy({**g, **c}[k], {}) for k in {**g, **c} if k != "params"}
                for g, c in zip(self.opt.param_groups, found.groups)
            ],
        ]

    def _observe(self, parts: Sequence[Part]) -> list[Any]:
        out: list[Any] = [_digests(m) for part in parts for m in part.members]
        return [*out, [{k: v for k, v in g.items() if k != "params"} for g in self.opt.param_groups]]


class _Closure:
    """Stands for the user's closure: it must be called once, before the first operator."""

    def __init__(self) -> None:
        self.calls, self.loss = 0, torch.zeros(())
        self.recorder: tape.Recorder | None = None

    def __call__(self) -> torch.Tensor:
        self.calls += 1
        if self.recorder is not None and self.recorder.operators:
            raise NotTraceable("it calls its closure after it has begun to update")
        if not torch.is_grad_enabled():
            raise NotTraceable("it calls its closure without gradients")
        return self.loss


def evaluated(closure: Callable, loss: Any) -> Callable:
    """The closure for a step that runs whole after all: its first call was made already, and gave ``loss``."""
    first = [loss]
    return lambda: first.pop() if first else closure()


def _why(error: Exception) -> str:
    """A reason to run whole."""
    return str(error) if isinstance(error, NotTraceable) else f"rehearsing it failed: {type(error).__name__}: {error}"


# -- members --------------------------------------------------------------------------------------------------------


def _counts(member: BoundParam) -> list[str]:
    """Names of the 0-dimensional states, which the host advances."""
    return [k for k, t, _ in member.items if is_count(k, t, member.param)]


def _plain(member: BoundParam) -> dict[str, Any]:
    """The state that is no tensor. Raises NotTraceable for what may change in place."""
    return {k: _plain_value(k, v) for k, v in (member.state or {}).items() if not isinstance(v, torch.Tensor)}


def _plain_value(key: str, value: Any) -> Any:
    if isinstance(value, values.ATOMS) or (type(value) is tuple and all(isinstance(v, values.ATOMS) for v in value)):
        return value
    raise NotTraceable(f"its state {key!r} is a {type(value).__name__}")


def _types(member: BoundParam) -> tuple:
    """All that the step's code can see of a member but shapes and values."""
    grad, param = member.param.grad, member.param
    states = tuple((k, t.dtype, str(t.device), t.requires_grad, is_count(k, t, param), t.dim() == 0) for k, t, _ in member.items)
    return (
        param.dtype,
        str(param.device),
        param.requires_grad,
        param.dim() == 0,
        None if grad is None else grad.dtype,
        None if member.state is None else tuple(member.state),
        states,
    )


def _stand_in(member: BoundParam, present: bool) -> tape.StandIn:
    """A new stand-in of this member. Raises NotTraceable for tensors that are not plain ones."""
    counts = _counts(member)
    for tensor in (member.param, *(t for _, t, _ in member.items)):
        if tensor.layout != torch.strided or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise NotTraceable(f"it updates a {type(tensor).__name__} of layout {tensor.layout}")
    grad = member.param.grad if member.param.grad is not None else member.param
    return tape.StandIn(member.param, grad if present else None, {k: t for k, t, _ in member.items if k not in counts})


def _digests(member: BoundParam) -> list[Any]:
    """Parameter, gradient, and state by key: what a step leaves behind."""
    grad = member.param.grad
    state = {k: values.digest(v) if isinstance(v, torch.Tensor) else v for k, v in (member.state or {}).items()}
    return [values.digest(member.param), None if grad is None else values.digest(grad), state]
