"""One message of every kind, each field set to something that is not its default.

Their bytes lie in tests/data/wire as the first version wrote them. Change no example: a new field
gets a second example of its message.
"""

from __future__ import annotations

import msgspec

from peer import protocol as p
from peer.planning.plan import LeftOut, Plan, PlanId, PlanState, PlanWindow, Split, StageLink
from peer.planning.profile import (
    EngineProfile,
    Fit,
    Link,
    ModelOffer,
    ModelShape,
    Port,
    Profile,
    Speed,
)
from peer.ring import frames as f

ADA, BOB = "abcdefghijklmnop", "qrstuvwxyz234567"
KEY, OTHER_KEY = (
    "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7",
    "JTKVSB%%)wK0E.X)V>+}o?pNmC{O&4W4b!Ni{Lh6",
)
DIGEST = "0123456789abcdef" * 4
PLAN = PlanId(term=7, number=3)
ADDRESSES = ("tcp://192.168.1.5:40001", "tcp://[fd00::5]:40001")

SHAPE = ModelShape(
    model="smollm2-135m-instruct-q4_1", digest=DIGEST, architecture="llama", layers=3, hidden=576,
    context=8192, layer_bytes=(10, 20, 30), layer_kv_bytes=(1, 2, 3), head_bytes=4, embed_bytes=5,
    output_bytes=6, tied=True, cut_starts=(0, 1, 2), cut_groups=((0, 1), (2,)), whole_why="why",
)  # fmt: skip
SPLIT = Split(
    windows=(
        PlanWindow(peer_id=ADA, first=0, last=1, backend="fake", memory_bytes=9, gpu_layers=0),
        PlanWindow(peer_id=BOB, first=1, last=3, backend="llama_cpp", memory_bytes=8, gpu_layers=1),
    ),
    context=2048, kv_cells=4096, slots=8, batch_tokens=256,
    left_out=(LeftOut(peer_id=BOB, why="no memory"),), why="by memory",
)  # fmt: skip
STATE = PlanState(
    plan=Plan(id=PLAN, coordinator=ADA, shape=SHAPE, split=SPLIT), phase="linking",
    links=(StageLink(peer_id=ADA, ring_port=40002, key=KEY, submit_port=40003),), why="bob joined",
)  # fmt: skip
PROFILE = Profile(
    peer_id=ADA, name="ada", os="linux", cores=8, memory_total_bytes=16 << 30,
    memory_available_bytes=12 << 30, disk_free_bytes=1 << 40,
    engines=(EngineProfile(backend="llama_cpp", device="CPU", kind="cpu",
                           memory_free_bytes=11 << 30, memory_total_bytes=16 << 30),),
    spread_all=True, context_wanted=4096, model_wanted="smollm2-135m-instruct-q4_1",
)  # fmt: skip
MEASURED_SHAPE = msgspec.structs.replace(
    SHAPE, layer_active_bytes=(10, 5, 30), layer_kinds=(0, 1, 0), vocabulary=49152
)
MEASURED_PROFILE = msgspec.structs.replace(
    PROFILE, objective="throughput", unified_memory=True, threads=4, cpu_share=0.5,
    disk_read_bytes_per_s=2e9,
    speeds=(
        Speed(digest=DIGEST, backend="llama_cpp", kind="cpu", threads=4, decode_s=(1e-3, 2e-3),
              prefill_s=(0.25, 0.5), prefill_tokens=512, window_s=1e-4, output_s=2e-4,
              correction=1.5),
    ),
    unmeasured=(DIGEST,),
    links=(Link(peer_id=BOB, rtt_s=5e-4, bytes_per_s=1.25e8),),
)  # fmt: skip
STREAMED = PlanState(
    plan=Plan(
        id=PLAN, coordinator=ADA, shape=MEASURED_SHAPE,
        split=Split(
            windows=(PlanWindow(peer_id=ADA, first=0, last=3, streamed_bytes=40, ahead_bytes=7),),
            context=1, kv_cells=1, slots=1, batch_tokens=1,
        ),
    ),
    phase="loading",
)  # fmt: skip
FITTED_SHAPE = msgspec.structs.replace(
    MEASURED_SHAPE,
    fits=(
        Fit(backend="mlx", weights="small", how="approximate", why="Q6_K",
            layer_bytes=(11, 21, 31), embed_bytes=6, output_bytes=7, ranks=(2, 4)),
    ),
)  # fmt: skip
CABLED_PROFILE = msgspec.structs.replace(
    PROFILE, weights="exact", islands="auto",
    ports=(
        Port(uuid="A1B2", peer_uuid="C3D4", receptacle="2", interface="en2", bits_per_s=8e10,
             addresses=("169.254.7.1",), rdma="rdma_en2"),
    ),
)  # fmt: skip
ISLAND = msgspec.structs.replace(
    STATE,
    plan=Plan(
        id=PLAN, coordinator=ADA, shape=FITTED_SHAPE,
        split=Split(
            windows=(PlanWindow(peer_id=ADA, first=0, last=3, backend="mlx", island=(BOB,),
                                devices=(("", "rdma_en2"), ("rdma_en3", ""))),),
            context=1, kv_cells=1, slots=1, batch_tokens=1,
        ),
    ),
    links=(StageLink(peer_id=ADA, ring_port=40002, key=KEY, island_port=40004),),
)  # fmt: skip
LEAVING_PROFILE = msgspec.structs.replace(
    PROFILE, leaving=True, unreachable=(BOB,), spare_bytes=5 << 30
)
WISHING_PROFILE = msgspec.structs.replace(
    MEASURED_PROFILE, draft_wanted="smollm2-135m-instruct-q4_1", kv_type="q8_0", flash="on",
    speculation="off",
    speeds=(
        msgspec.structs.replace(
            MEASURED_PROFILE.speeds[0], short_chunks=((16, 1.5), (64, 1.25))
        ),
    ),
)  # fmt: skip
HURRIED = msgspec.structs.replace(STATE, phase="draining", hurry=True)
TIMED = p.Timed(decode_s=1e-3, prefill_s=1e-4, tpot_s=2e-3)
TIMED_MORE = p.Timed(
    decode_s=1e-3, wait_s=2e-3, send_s=1e-4, drafted=9, accepted=8, read=7, reused=6
)
FASTER_STATE = msgspec.structs.replace(
    STATE,
    plan=msgspec.structs.replace(
        STATE.plan,
        split=msgspec.structs.replace(
            SPLIT, chunk_tokens=128, kv_type="q8_0", flash="on", speculation="off", draft=DIGEST
        ),
    ),
)
SAMPLING = p.Sampling(
    temperature=0.5, top_k=50, top_p=0.75, min_p=0.25, repeat_penalty=1.25, repeat_last_n=32,
    frequency_penalty=0.5, presence_penalty=-0.5, logit_bias=((7, -1.5),), seed=42,
)  # fmt: skip
INTRODUCTION = {
    "protocol": 1, "cluster": "home", "peer_id": ADA, "name": "ada", "incarnation": 12345,
    "addresses": ADDRESSES, "version": "0.1.0", "term": 7,
}  # fmt: skip

CONTROL: list[p.Control] = [
    p.Hello(**INTRODUCTION),  # type: ignore[arg-type]
    p.Welcome(**INTRODUCTION),  # type: ignore[arg-type]
    p.Refused(code="cluster", why="another cluster", protocol=1),
    p.Goodbye(why="stopping"),
    p.Heartbeat(term=7, coordinator=ADA, followed=True),
    p.Gossip(peers=(p.Sighted(peer_id=BOB, key=KEY, addresses=ADDRESSES),)),
    p.Announce(
        profile=PROFILE,
        models=(ModelOffer(shape=SHAPE, pulled_s=1.5e9, parts=("head", "layer-000")),),
    ),
    p.Plans(term=7, states=(STATE,), why_none="no memory"),
    p.Report(
        plan=PLAN, phase="ready", done_bytes=1, total_bytes=2, ring_port=40002, submit_port=40003,
        key=KEY, weights_bytes=3, kv_bytes=4, compute_bytes=5, active=6, why="slow disk",
    ),
    p.ManifestWanted(request=1, digest=DIGEST),
    p.ManifestHere(request=1, digest=DIGEST, data=b"{}"),
    p.ChunkWanted(request=2, digest=DIGEST, part="layer-001", offset=65536, length=1024),
    p.ChunkHere(request=2, data=b"\x00\x01\xff"),
    p.NotHere(request=3, why="evicted"),
    p.Announce(
        profile=MEASURED_PROFILE,
        models=(ModelOffer(shape=MEASURED_SHAPE, pulled_s=1.5e9, parts=("head",)),),
    ),
    p.Plans(term=7, states=(STREAMED,), measure=(DIGEST,)),
    p.Report(plan=PLAN, phase="linked", timed=TIMED),
    p.Plans(
        term=7, states=(),
        reports=(p.PeerReport(peer_id=BOB, report=p.Report(plan=PLAN, phase="linked")),),
    ),
    p.Probe(request=4, padding=b"\x00\x01"),
    p.Probed(request=4, busy=True),
    p.Announce(profile=LEAVING_PROFILE),
    p.Plans(term=7, states=(HURRIED,)),
    p.Report(plan=PLAN, phase="failed", lost=BOB, blamed=ADA),
    p.Suspect(peer_id=BOB),
    p.Opinion(peer_id=BOB, heard=True, ago_s=0.5),
    p.Outlook(
        term=7, losses=(p.Loss(peer_id=BOB, outcome="fetch", fetch_bytes=7, why="two parts"),),
        spares=(p.Spare(peer_id=ADA, digest=DIGEST, parts=("layer-001",)),),
    ),
    p.Announce(
        profile=WISHING_PROFILE,
        models=(
            ModelOffer(
                shape=msgspec.structs.replace(
                    MEASURED_SHAPE, tokenizer="bpe 49152", kv_types=("f16", "q8_0")
                ),
                pulled_s=1.5e9, parts=("head",),
            ),
        ),
    ),
    p.Announce(
        profile=CABLED_PROFILE,
        models=(ModelOffer(shape=FITTED_SHAPE, pulled_s=1.5e9, parts=("head",)),),
    ),
    p.Plans(term=7, states=(ISLAND,)),
    p.Report(plan=PLAN, phase="ready", island_port=40004),
]  # fmt: skip

ANSWERING: list[p.Answering] = [
    p.Submit(request="r-1", plan=PLAN, ids=b"\x01\x00\x00\x00", sampling=SAMPLING, tokens_max=200,
             ends=(2, 3), delivered=1),
    p.Cancel(request="r-1", plan=PLAN),
    p.Tokens(request="r-1", plan=PLAN, position=9, ids=(5, 6), finish="length"),
    p.Unanswered(request="r-1", plan=PLAN, code="stale", why="plan 7.2 is over"),
]  # fmt: skip

PIPE: list[p.Pipe] = [
    p.StageOrder(plan=STATE, peer_id=ADA, folder="/var/lib/halka/models/x", threads=4, step_s=90.0,
                 bind="127.0.0.1", admitted=(KEY,)),
    p.StageConnect(next_address="tcp://10.0.0.2:40002", next_key=KEY, previous_key=OTHER_KEY),
    p.StageAdmit(keys=(KEY, OTHER_KEY)),
    p.StageStop(),
    p.StageNews(phase="linked", ring_port=1, submit_port=2, key=KEY, weights_bytes=3, kv_bytes=4,
                compute_bytes=5, active=6, steps=7, tokens=8, dropped=9, why="said"),
    p.StageNews(phase="linked", timed=TIMED),
    p.StagePing(number=3),
    p.StageNews(phase="linked", pong=3, blamed=BOB),
    p.StageOrder(plan=FASTER_STATE, peer_id=ADA, folder="/x", threads=4, draft_folder="/y"),
    p.StageNews(phase="linked", timed=TIMED_MORE),
    p.StageOrder(plan=ISLAND, peer_id=ADA, folder="/x", threads=4, weights="small"),
    p.StageConnect(next_address="tcp://10.0.0.2:40002", next_key=KEY, previous_key=OTHER_KEY,
                   island=("10.0.0.1:40004", "10.0.0.2:40005"),
                followers=(p.Follower(address="tcp://10.0.0.2:40003", key=KEY),)),
    p.StageNews(phase="ready", island_port=40004),
]  # fmt: skip

FAULTS = (f.Fault(slot=1, peer_id=BOB),)
RING: list[f.FrameHeader | f.Sampled | f.Meet] = [
    f.FrameHeader(
        plan=PLAN, step=11, window=1, rows=2, hidden=576,
        ops=(f.Open(slot=1, sampling=SAMPLING, history=b"\x02\x00\x00\x00"),
             f.Trim(slot=2, position=5), f.Copy(source=1, target=2, length=4)),
        faults=FAULTS,
    ),
    f.Sampled(plan=PLAN, step=11, tokens=(5, 6), faults=FAULTS),
    f.FrameHeader(
        plan=PLAN, step=12, window=1, rows=2, hidden=576,
        drafts=(f.Draft(slot=1, ids=b"\x02\x00\x00\x00"),), spent_s=0.5, slowest_s=0.25,
    ),
    f.Sampled(plan=PLAN, step=12, tokens=(5, 6), taken=(2,), spent_s=0.5, slowest_s=0.25),
    f.Meet(plan=PLAN, addresses=("10.0.0.1:40004", "10.0.0.2:40005")),
]  # fmt: skip

ALL: list[msgspec.Struct] = [*CONTROL, *ANSWERING, *PIPE, *RING]
