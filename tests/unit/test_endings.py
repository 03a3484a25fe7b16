"""Why a stage ended, from what crashed processes really print."""

from __future__ import annotations

from peer.ring.endings import WORDS_MAX, last_words, why_ended

SEGFAULT = r"""
streaming=1,2 ahead=0
Fatal Python error: Segmentation fault

Current thread 0x00007f6a0c5b9740 (most recent call first):
  File "/home/eve/halka/lib/python3.11/ctypes/__init__.py", line 519 in string_at
  File "/home/eve/halka/lib/python3.11/site-packages/backends/fake_faults.py", line 71 in at_step
  File "/home/eve/halka/lib/python3.11/site-packages/backends/fake.py", line 145 in run
  File "<frozen runpy>", line 88 in _run_code

Extension modules: numpy.core._multiarray_umath, zmq.backend.cython._zmq (total: 20)
""".strip().splitlines()

GGML = r"""
llama_context: n_ctx = 4096
/home/ci/build/llama/ggml/src/ggml-backend.cpp:1234: GGML_ASSERT(buffer) failed
Fatal Python error: Aborted

Current thread 0x00007f6a0c5b9740 (most recent call first):
  File "/usr/lib/python3.11/site-packages/llama_cpp/_internals.py", line 306 in decode
""".strip().splitlines()

CUDA = r"""
CUDA error: out of memory
  current device: 0, in function alloc at /build/ggml/src/ggml-cuda/ggml-cuda.cu:455
  cuMemCreate(&handle, reserve_size, &prop, 0)
/build/ggml/src/ggml-cuda/ggml-cuda.cu:88: CUDA error
""".strip().splitlines()

RAISED = r'''
Traceback (most recent call last):
  File "<frozen runpy>", line 198, in _run_module_as_main
  File "/opt/halka/peer/ring/stage.py", line 377, in main
    stage.loop()
    ~~~~~~~~~~^^
  File "/opt/halka/peer/ring/scheduler.py", line 210, in _returned
    assert emits
AssertionError: emits
'''.strip().splitlines()  # fmt: skip


def test_a_dump_is_told_by_what_happened_and_its_two_innermost_functions() -> None:
    assert why_ended(-11, SEGFAULT) == (
        "its process was ended by SIGSEGV; last words: Fatal Python error: Segmentation fault"
        " | in string_at (__init__.py:519) | in at_step (fake_faults.py:71)"
    )


def test_an_engines_own_assertion_is_what_is_told_of_its_abort() -> None:
    assert why_ended(-6, GGML) == (
        "its process was ended by SIGABRT; last words: "
        "ggml-backend.cpp:1234: GGML_ASSERT(buffer) failed"
    )
    assert last_words(CUDA) == "CUDA error: out of memory | ggml-cuda.cu:88: CUDA error"


def test_an_exception_is_told_with_the_place_where_it_was_raised() -> None:
    assert why_ended(1, RAISED) == (
        "its process ended with code 1; last words: "
        "AssertionError: emits | in _returned (scheduler.py:210)"
    )


def test_other_ends_are_told_by_the_last_three_lines() -> None:
    words = last_words([f"line {i}" for i in range(9)])
    assert words == "line 6 | line 7 | line 8"
    assert len(last_words(["x" * 500] * 9)) == WORDS_MAX
    assert why_ended(3, []) == "its process ended with code 3"
    assert why_ended(-70, []) == "its process was ended by signal 70"


def test_where_a_stage_was_killed_its_log_has_not_the_reason() -> None:
    why = why_ended(-9, ["streaming=1,2 ahead=0"])
    assert why == "its process was ended by SIGKILL (by hand, or because memory ran out)"
    assert "ASSERT" in why_ended(-9, GGML)  # it was killed in the middle of its abort


def test_a_kill_for_memory_names_the_setting_that_mends_it() -> None:
    why = why_ended(-9, [], loading=True, memory_ran_out=True)
    assert why.startswith("its process was killed while it loaded because memory ran out")
    assert "`memory`" in why


def test_a_stage_that_ended_before_it_was_ready_is_said_to_have() -> None:
    assert "SIGSEGV while it loaded; last words: Fatal" in why_ended(-11, SEGFAULT, loading=True)
    assert why_ended(1, [], loading=True) == "its process ended with code 1 while it loaded"


def test_no_folder_of_this_machine_is_told() -> None:
    lines = ["model /home/eve/models/qwen.gguf: cannot be read", "see http://ggml.ai/a/b or 1/2"]
    assert last_words(lines) == ("model qwen.gguf: cannot be read | see http://ggml.ai/a/b or 1/2")
