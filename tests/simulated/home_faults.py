"""What one seed does to its home: which kinds of misfortune, how often, and to whom."""

from __future__ import annotations

import itertools
import random
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from tests.simulated.home_wires import Machine, World

KINDS = {  # the most of each for a second of chaos, in the whole home
    "cut": 0.35, "one_way": 0.35, "split": 0.2, "flap": 0.15, "kill": 0.35, "power": 0.2,
    "stage": 0.4, "hang": 0.2, "sleep": 0.3, "stop": 0.3, "leave": 0.2, "join": 0.1, "stray": 3.0,
    "ill": 0.1, "reset": 0.8,
}  # fmt: skip
ALWAYS = {"heal": 0.25, "start": 0.35}


@dataclass(frozen=True, slots=True)
class Faults:
    """Rates of each kind, for each second of chaos. Each is absent in about half of the seeds."""

    rates: dict[str, float]

    @classmethod
    def draw(cls, rng: random.Random) -> Faults:
        """Of one home; one home in twelve has none at all."""
        some = {k: rng.random() * most if rng.random() < 0.5 else 0.0 for k, most in KINDS.items()}
        if rng.random() < 0.08:
            return cls({"stray": 0.5})
        return cls(some | ALWAYS)

    @property
    def peaceful(self) -> bool:
        """Nothing happens that an answer could notice."""
        return set(self.rates) == {"stray"}


class Misfortune(World, ABC):
    """The home's half that brings it trouble."""

    faults: Faults
    chaos = True

    def misfortune(self) -> None:
        """The next one, after a time that the rates give."""
        if not self.chaos:
            return
        kinds, rates = zip(*self.faults.rates.items(), strict=True)
        kind = self.rng.choices(kinds, rates)[0]
        a, b = (self.machines[name] for name in self.rng.sample(list(self.machines), 2))
        if kind not in ("heal", "start", "stray"):
            self.tell("--", kind, a.short, b.short)
        self.counts[kind] += 1
        getattr(self, f"happens_{kind}")(a, b)
        self.at(self.rng.expovariate(sum(rates)), self.misfortune)

    # Cables ---------------------------------------------------------------------------------------

    def happens_cut(self, a: Machine, b: Machine) -> None:
        self.block((a.name, b.name), (b.name, a.name))

    def happens_one_way(self, a: Machine, b: Machine) -> None:
        self.block((a.name, b.name))

    def happens_split(self, a: Machine, b: Machine) -> None:
        """Two halves, or one peer that hears no other."""
        side = {name for name in self.machines if self.rng.random() < 0.5} | {a.name}
        pairs = itertools.permutations(self.machines, 2)
        self.block(*((x, y) for x, y in pairs if (x in side) != (y in side)))

    def happens_heal(self, a: Machine, b: Machine) -> None:
        self.unblock(*sorted(self.blocked))

    def happens_flap(self, a: Machine, b: Machine) -> None:
        """A link that is up and down, and up and down."""
        wait_s = self.rng.choice((0.3, 1.0, 2.0))
        self.flap((a.name, b.name), (b.name, a.name), wait_s, self.now + 6.0)

    def flap(
        self, one: tuple[str, str], other: tuple[str, str], wait_s: float, until: float
    ) -> None:
        if not self.chaos:
            return
        if one in self.blocked or self.now >= until:
            self.unblock(one, other)
        else:
            self.block(one, other)
        if self.now < until:
            self.at(wait_s, self.flap, one, other, wait_s, until)

    def happens_reset(self, a: Machine, b: Machine) -> None:
        """One connection breaks, and can be made again at once."""
        if wires := [wire for process in a.processes for wire in process.wires]:
            self.reset(self.rng.choice(wires))

    # Machines -------------------------------------------------------------------------------------

    def happens_kill(self, a: Machine, b: Machine) -> None:
        """The agent ends without a word, and its stages with it."""
        if a.agent and a.agent.alive:
            self.end_agent(a)

    def happens_power(self, a: Machine, b: Machine) -> None:
        """Nobody is told."""
        if a.powered:
            for process in list(a.processes):
                self.over(process, powered=False)
            a.powered = False
            self.ended(a)

    def happens_start(self, a: Machine, b: Machine) -> None:
        if not (a.agent and a.agent.alive):
            self.start(a)

    def happens_leave(self, a: Machine, b: Machine) -> None:
        if a.agent and a.agent.alive:
            a.agent.do(a.agent.leave)

    def happens_join(self, a: Machine, b: Machine) -> None:
        """Somebody who was never here."""
        if len(self.machines) < 8:
            self.start(self.new_machine())

    def happens_sleep(self, a: Machine, b: Machine) -> None:
        """The whole machine stands still for a while."""
        wait_s = self.rng.choice((0.3, 1.0, 3.0, 8.0))
        for process in [p for p in a.processes if not p.stopped]:
            self.pause(process, wait_s)

    def happens_stop(self, a: Machine, b: Machine) -> None:
        """The agent's process stands still, its stages do not."""
        if a.agent and a.agent.alive and not a.agent.stopped:
            self.pause(a.agent, self.rng.choice((0.3, 1.0, 3.0, 8.0)))

    def pause(self, process: Any, wait_s: float) -> None:
        process.stop()
        self.at(wait_s, self.resume, process)

    def resume(self, process: Any) -> None:
        if process.alive and process.stopped:
            process.go_on()

    # Stages ---------------------------------------------------------------------------------------

    def some_stage(self, machine: Machine) -> Any:
        agent = machine.agent
        stages = [agent.stages[plan] for plan in sorted(agent.stages)] if agent else []
        return self.rng.choice(stages) if stages else None

    def happens_stage(self, a: Machine, b: Machine) -> None:
        """The engine crashes."""
        if stage := self.some_stage(a):
            self.tell(a.short, "its stage of plan", stage.plan.id, "crashes")
            stage.exit("its process was ended by SIGSEGV", "")

    def happens_hang(self, a: Machine, b: Machine) -> None:
        """It answers nobody for a while, or until its agent ends it."""
        stage = self.some_stage(a)
        if stage and not stage.stopped:
            stage.hung = stage.leased  # nobody asks one that loads
            self.pause(stage, self.rng.choice((0.5, 2.0, 5.0, 30.0, 300.0)))

    def happens_ill(self, a: Machine, b: Machine) -> None:
        """Its numbers are not finite for a while."""
        stage = self.some_stage(a)
        if stage:
            stage.ill_until = self.now + self.rng.choice((0.1, 1.0, 20.0))

    def happens_stray(self, a: Machine, b: Machine) -> None:
        """A frame of some time and some plan comes (again), to some stage; or a head's word comes
        to the entry peer again."""
        if self.said and self.rng.random() < 0.4:
            late = [word for word in self.said if word[0].entry.might_take(word[1])]
            agent, message = self.rng.choice(late or self.said)
            return agent.do(agent.entry.hear, message)
        stages = [s for m in self.machines.values() for s in m.processes if hasattr(s, "hear_ring")]
        if not (stages and self.flown):
            return
        source, body = self.rng.choice(self.flown)
        # Another plan of the same number has other keys: what its stages say reaches no other's.
        stages = [s for s in stages if s.plan == source.plan or s.plan.id != body.plan]
        to = source.plan.after(source.machine.name)
        right = [s for s in stages if s.plan == source.plan and s.machine.name == to]
        if stages:
            stage = self.rng.choice(right if right and self.rng.random() < 0.5 else stages)
            stage.do(stage.hear_ring, body)

    flown: Any  # frames of late, and to whom
    said: Any  # what heads told entry peers

    # What the home does with it -------------------------------------------------------------------

    @abstractmethod
    def start(self, machine: Machine) -> None:
        """An agent begins."""

    @abstractmethod
    def ended(self, machine: Machine) -> None:
        """An agent has ended."""

    @abstractmethod
    def new_machine(self) -> Machine:
        """One more."""

    def end_agent(self, machine: Machine) -> None:
        """The agent's process ends; its stages read the end of their pipes, and end."""
        agent = machine.agent
        self.over(agent)
        for process in list(machine.processes):
            self.at(self.rng.random() * 0.05, self.orphaned, process)
        self.ended(machine)

    def orphaned(self, process: Any) -> None:
        if process.alive and process.stopped:  # it reads that once it runs again
            self.at(0.5, self.orphaned, process)
        else:
            self.over(process)
