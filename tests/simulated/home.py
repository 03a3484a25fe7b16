"""A whole home in one heap: real machines of every kind in every peer, virtual time, one seed.

Every peer has the real membership, election, duty and rollout, every head the real scheduler, every
answer the real generation; planner and engine are simple ones. The shells between them are modelled
as thinly as they are (`home_agent`, `home_entry`, `home_stage`), the network as TCP and ZeroMQ make
it (`home_wires`). Each seed draws its home, its answers and its mix of faults.

What must always hold is checked as it happens: every token once, in order, and the right one. What
must hold once faults stop is checked at the end: one coordinator, one plan that serves where the
model can be served by those who are here, else a reason, and no answer that still waits. A failure
names the seed and tells the last events.
"""

from __future__ import annotations

from collections import defaultdict, deque
from typing import Any

from peer.cluster import membership as m
from peer.config import Timing
from peer.planning.making import Answer as Planned
from peer.planning.making import Question
from peer.planning.making import answer as solve
from peer.planning.plan import Plan
from peer.planning.profile import EngineProfile, Profile
from peer.protocol import Plans, Sampling
from tests.coordinator import MIB, shape
from tests.simulated.home_agent import Agent
from tests.simulated.home_engine import VOCABULARY, Truth
from tests.simulated.home_entry import Answer, Entry
from tests.simulated.home_faults import Faults, Misfortune
from tests.simulated.home_planner import Planner
from tests.simulated.home_stage import Stage
from tests.simulated.home_wires import Machine, Process

CALM_S = 3.0  # for a first ring to form, in most homes
CHAOS_S = 14.0
BOUND_S = 60.0  # after the last fault: every answer is done by then
LAST_S = 60.0  # for one more answer, when all is well again
LETTERS = "abcdefghij"


class Home(Misfortune):
    """Peers, wires, answers and a clock. `run` plays the whole story of the seed."""

    timing = Timing()
    make_agent: type[Agent] = Agent
    make_entry: type[Entry] = Entry
    make_stage: type[Stage] = Stage

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        rng = self.rng
        self.delay_max_s = rng.choice((0.004, 0.02, 0.02, 0.08))
        self.spike = rng.choice((0.0, 0.0, 0.01, 0.05))
        self.shape = shape(layers=rng.randint(4, 12))
        self.real_planner = seed % 200 == 7
        self.spread_all = rng.random() < 0.6
        slots, context = rng.choice((1, 2, 4, 8, 8)), rng.choice((64, 96, 512))
        self.planner = Planner(
            context, context * rng.choice((1, 4, 8)), slots, rng.choice((8, 16, 64)),
            2 if rng.random() < 0.2 else 1, rng.choice((0, 4, 16)),
        )  # fmt: skip
        self.begins = rng.random() < 0.5  # prompts like others do
        self.flown: deque[tuple[Stage, Any]] = deque(maxlen=40)
        self.said: deque[tuple[Agent, Any]] = deque(maxlen=40)
        self.costs: dict[str, float] = {}
        self.rooms: dict[str, int] = {}
        self.claims: defaultdict[str, set[int]] = defaultdict(set)
        self.follows: dict[str, tuple[int, str]] = {}
        self.answers: list[Answer] = []
        self.asked = 0
        self.room_few = rng.random() < 0.5  # nobody holds the whole model
        for _ in range(rng.choice((2, 2, 3, 3, 3, 4, 4, 5, 6, 7))):
            self.new_machine()
        whole = rng.randint(1, len(self.machines))
        for name in rng.sample(list(self.machines), whole):
            self.machines[name].parts = set(self.shape.window_parts(0, self.shape.layers))
        self.faults = Faults.draw(rng)
        at_once = min(slots, self.planner.kv_cells // 70 or 1)  # fewer where they are long in line
        self.answers_max = min(rng.choice((1, 2, 4, 8, 20)), 3 * at_once)
        # As many tokens as a healthy ring of all makes in half of what there is time for.
        hop_s = self.delay_max_s / 2 + 0.4 * self.spike + 0.04
        token_s = hop_s * len(self.machines) * self.planner.rounds
        most = BOUND_S / 2 * min(at_once, self.answers_max) / self.answers_max / token_s
        self.tokens_most = max(4, min(40, int(most)))

    # The story ------------------------------------------------------------------------------------

    def run(self) -> None:
        """A ring forms; answers and faults come; faults stop; all answers end; one more each."""
        for machine in self.machines.values():
            self.at(self.rng.random() * 0.5, self.start, machine)
        calm_s = CALM_S if self.rng.random() < 0.8 else 0.1
        for _ in range(self.answers_max):
            self.at(calm_s + self.rng.random() * CHAOS_S * 0.8, self.client)
        self.at(calm_s + self.rng.random(), self.misfortune)
        self.play(calm_s + CHAOS_S)
        self.end_chaos()
        self.settle()
        self.last_answers()

    def end_chaos(self) -> None:
        """No more faults: cables mend, machines run, and most of those that are off are started."""
        self.chaos = False
        self.tell("== no more faults")
        self.unblock(*sorted(self.blocked))
        for machine in list(self.machines.values()):
            if not self.is_up(machine) and (machine.powered or self.rng.random() < 0.5):
                self.start(machine)
            for process in list(machine.processes):
                if not getattr(process, "hung", False):  # that is for its agent to notice
                    self.resume(process)
        if not any(map(self.is_up, self.machines.values())):
            self.start(next(iter(self.machines.values())))

    def settle(self) -> None:
        """Play until all is as it must be."""
        until = self.now + BOUND_S
        while trouble := self.trouble():
            if not self.here():  # the last one wished to go
                self.start(next(iter(self.machines.values())))
            elif self.now >= until:
                self.fail(f"{BOUND_S:.0f} s after the last fault: {trouble}")
            self.play(0.5)

    def last_answers(self) -> None:
        """Everybody who is here is asked once more."""
        if not self.can_serve():
            return
        self.tell("== once more, everybody")
        last = [self.client(machine, short=True) for machine in self.here()]
        until = self.now + LAST_S
        while any(answer and not answer.ended for answer in last) and self.now < until:
            self.play(0.25)
        for answer in last:
            if answer and answer.ended != "done":
                self.fail(f"{answer.name}, when all was well: {answer.ended or 'it never ended'}")

    # What must hold once faults stop --------------------------------------------------------------

    def is_up(self, machine: Machine) -> bool:
        return bool(machine.agent and machine.agent.alive)

    def here(self) -> list[Machine]:
        """Machines with an agent that runs and wants to stay, by name."""
        return [m for _, m in sorted(self.machines.items()) if self.is_up(m)]

    def can_serve(self) -> bool:
        """Whether the parts and the memory of those who are here are enough, and none of them
        failed too often."""
        here = self.here()
        parts = set().union(*(machine.parts for machine in here))
        wanted = set(self.shape.window_parts(0, self.shape.layers))
        coordinator = self.machines[here[0].agent.election.coordinator].agent
        barred = coordinator.rollout._failures.barred(self.shape.digest)
        room = sum(self.rooms[machine.name] for machine in here if machine.name not in barred)
        return parts >= wanted and room >= self.shape.layers

    def trouble(self) -> str:
        """What is missing, or ""."""
        here = self.here()
        names = {machine.name for machine in here}
        for machine in here:
            members = machine.agent.membership.members | {machine.name}
            if members != names:
                seen = "".join(sorted(name[0] for name in members))
                return f"{machine.short} sees {seen}, here are {''.join(x.short for x in here)}"
        views = {machine.agent.election.coordinator for machine in here}
        terms = {machine.agent.election.term for machine in here}
        if len(views) != 1 or not views <= names or len(terms) != 1:
            return f"no one coordinator: {sorted(views)}, terms {sorted(terms)}"
        if any(machine.agent.leaving for machine in here):
            return "somebody is still leaving"
        return self.trouble_of_plans(here) or self.trouble_of_answers()

    def trouble_of_plans(self, here: list[Machine]) -> str:
        coordinator = self.machines[here[0].agent.election.coordinator].agent
        states = coordinator.rollout.states
        serving = [s.plan for s in states if s.phase == "serving"]
        if not self.can_serve():
            heard = coordinator.heard
            if serving or (heard and heard.why_none):
                return ""
            return "nothing is served, and nobody says why"
        if len(serving) != 1:
            return f"not one plan serves: {[(str(s.plan.id), s.phase) for s in states]}"
        for machine in here:
            served = machine.agent.duty.serving()
            if served is None or served.plan.id != serving[0].id:
                return f"{machine.short} follows {served and served.plan.id}, not {serving[0].id}"
            if not machine.agent.entry.offer:
                return f"{machine.short} offers nothing"
        return ""

    def trouble_of_answers(self) -> str:
        late = [a for a in self.answers if not a.ended]
        if late:
            a, plan = late[0], late[0].asked and late[0].asked.plan
            return f"{a.name} still waits: {a.given} of {a.tokens_max} tokens, asked {plan}"
        return ""

    # Peers ----------------------------------------------------------------------------------------

    def new_machine(self) -> Machine:
        """One more, with a memory of its own."""
        name = LETTERS[len(self.machines)] * 16
        machine = self.machines[name] = Machine(name)
        layers = self.shape.layers
        self.rooms[name] = self.rng.randint(1, layers) if self.room_few else 2 * layers
        self.costs[name] = self.rng.uniform(0.005, 0.05)
        return machine

    def profile(self, name: str) -> Profile:
        return Profile(
            peer_id=name,
            name=f"machine-{name[0]}",
            os="linux",
            cores=4,
            memory_total_bytes=1 << 36,
            memory_available_bytes=self.rooms[name] * MIB + (4 * MIB if self.real_planner else 0),
            engines=(EngineProfile("fake", "CPU", "cpu"),),
            unmeasured=(self.shape.digest,),
            spread_all=self.spread_all,
        )

    def start(self, machine: Machine) -> None:
        """An agent begins, where none runs."""
        if self.is_up(machine):
            return
        if not machine.powered:
            self.power_up(machine)
        self.follows.pop(machine.name, None)
        machine.agent = self.make_agent(self, machine, self.profile(machine.name))
        self.tell(machine.short, "starts, run", machine.runs, "term", machine.stored_term)
        self.sight(machine.agent)

    def sight(self, agent: Agent) -> None:
        """What mDNS does, now and then."""
        if not agent.alive:
            return
        for name in list(self.machines):
            if name != agent.me and (not self.chaos or self.rng.random() < 0.8):
                seen = m.Seen(name, name, (name,))
                self.at(self.rng.random() * 0.5, agent.do, agent.feed, seen)
        self.at(8.0, self.sight, agent)

    def ended(self, machine: Machine) -> None:
        """Its clients are gone with it."""
        self.tell(machine.short, "is no more")
        for answer in self.answers:
            if answer.agent is machine.agent:
                answer.ended = answer.ended or "gone"

    def gone(self, machine: Machine) -> None:
        """It went politely."""
        for stage in list(machine.agent.stages.values()):
            self.over(stage)
        self.end_agent(machine)

    def listen(self, process: Process) -> int:
        """A port of its own."""
        port = 1000 + len(self.ports)
        self.ports[port] = process
        return port

    def load_time(self) -> float:
        return 0.1 + self.rng.random() * 0.6

    def plan(self, question: Question) -> Planned:
        return solve(question) if self.real_planner else self.planner(question)

    # Clients --------------------------------------------------------------------------------------

    def client(self, machine: Machine | None = None, short: bool = False) -> Answer | None:
        """Somebody asks somebody."""
        rng = self.rng
        up = [machine for machine in self.here() if not machine.agent.leaving]
        machine = machine or (rng.choice(up) if up else None)
        if machine is None:
            return None
        self.asked += 1
        prompt = tuple(rng.randrange(2, VOCABULARY) for _ in range(rng.randint(1, 30)))
        if self.begins and self.answers:  # the next turn, or what another one began with
            prompt = (*rng.choice(self.answers).truth.ids[: rng.choice((12, 30))], *prompt[:10])
        sampling = Sampling(
            temperature=rng.choice((0.0, 0.8)),
            repeat_penalty=rng.choice((1.0, 1.0, 1.1)),
            repeat_last_n=rng.choice((-1, 4, 64)),
            seed=rng.randrange(1 << 32),
        )
        wanted = rng.randint(1, 3) if short else rng.choice((1, 4, 12, 24, 40, 40))
        tokens_max = min(wanted, self.tokens_most)
        truth = Truth(self.seed, prompt, sampling)
        name = f"answer-{self.asked}@{machine.short}"
        answer = Answer(name, machine.agent, prompt, sampling, tokens_max, truth, self.now)
        self.answers.append(answer)
        agent = machine.agent
        agent.do(agent.entry.begin, answer)
        if not short and rng.random() < 0.15:
            self.at(rng.random() * 6.0, agent.do, agent.entry.cancel, answer)
        return answer

    def answered(self, answer: Answer) -> None:
        self.tell(answer.name, "ends:", answer.ended, answer.given)
        self.counts["done" if answer.ended == "done" else answer.ended.partition(":")[0]] += 1
        if answer.ended not in ("done", "gone") and not answer.ended.partition(": ")[2]:
            self.fail(f"{answer.name} ends without a reason")
        if answer.ended.startswith("failed") and self.faults.peaceful and self.can_serve():
            self.fail(f"{answer.name} ends, though nothing happened: {answer.ended}")

    # What always holds ----------------------------------------------------------------------------

    def elected(self, agent: Agent, coordinator: str, term: int) -> None:
        """One claim for each term and peer, terms that never go back, one coordinator in each."""
        name = agent.me
        self.tell(agent.machine.short, "follows", coordinator[:1] or "nobody", "in term", term)
        before, last = self.follows.get(name, (-1, ""))
        if not coordinator:
            return
        if term < before or (term == before and last != coordinator):
            self.fail(f"{name} follows {last} in {before}, then {coordinator} in {term}")
        self.follows[name] = (term, coordinator)
        if coordinator == name and (before, last) != (term, name):
            if term in self.claims[name]:
                self.fail(f"{name} claims term {term} twice")
            self.claims[name].add(term)

    def published(self, agent: Agent, plans: Plans) -> None:
        """Only who coordinates publishes, under its own term, and one plan that serves."""
        if plans.term != agent.coordinates:
            self.fail(f"{agent.me} publishes in term {plans.term}, and is in {agent.coordinates}")
        serving = [state.plan.id for state in plans.states if state.phase == "serving"]
        if len(serving) > 1:
            self.fail(f"{agent.me} lets several plans serve: {serving}")

    def serves(self, agent: Agent, plan: Plan | None) -> None:
        self.tell(agent.machine.short, "serves", plan.id if plan else "nothing")

    def flew(self, source: Stage, body: Any) -> None:
        """A frame that may come again, later or elsewhere."""
        if self.chaos:
            self.flown.append((source, body))

    def spoke(self, to: Agent, message: Any) -> None:
        """The same, from a head to an entry peer."""
        if self.chaos:
            self.said.append((to, message))
