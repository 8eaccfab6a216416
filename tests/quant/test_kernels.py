"""The compiled kernels against their twins; how they are built, and what happens without them."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from llm_from_scratch.core.files import ASIDE
from llm_from_scratch.model.positions import angles, rope_frequencies
from llm_from_scratch.quant import build, kernels, plain
from llm_from_scratch.quant.packed import PackedWeight
from tests.quant.test_packed import MAKERS

# The few things of NEON that kernels.cpp uses, in plain C++: its arithmetic without the processor.
NEON = Path(__file__).parent / "neon"
VARIANTS = {  # flags that take instructions away
    "native": (),
    "avx2": ("-mno-avx512f", "-O1"),
    "neon": ("-DSCRATCHLM_PLAIN", "-DWITH_NEON", "-O1", "-idirafter", str(NEON)),
    "plain": ("-DSCRATCHLM_PLAIN", "-O1"),
}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=VARIANTS, scope="module")
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each of the ways in which the kernels can be built here."""
    if not kernels.available():
        pytest.skip("no compiler here")
    if request.param == "avx2" and "avx512f" not in build.processor():
        pytest.skip("the native build has no more than this")
    if request.param == "neon" and platform.machine() in ("arm64", "aarch64"):
        pytest.skip("the native build is this")
    library = build.load(VARIANTS[request.param])
    before = kernels.library
    kernels.library = lambda: library  # type: ignore[assignment]
    kernels._kernel.cache_clear()
    assert kernels.instructions() == request.param or request.param == "native"
    try:
        yield request.param
    finally:
        kernels.library = before
        kernels._kernel.cache_clear()


@pytest.mark.parametrize("name", MAKERS)
def test_products_in_every_build(variant: str, name: str) -> None:
    packed, weights = MAKERS[name]()
    for n in (1, 2, 5, 19):
        x = random(n, packed.in_features, seed=n)
        wanted = x.double() @ weights.double().T
        assert (packed.linear(x) - wanted).norm() < 5e-5 * wanted.norm()
    ids = torch.tensor([0, 17, 3])
    assert torch.equal(packed.rows(ids), weights[ids])
    with pytest.raises(IndexError, match="a row was asked for"):
        packed.rows(torch.tensor([0, packed.out_features]))


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads_computes_the_same(threads: int) -> None:
    if not kernels.available():
        pytest.skip("no compiler here")
    packed, _ = MAKERS["Q4_1"]()
    x = random(33, packed.in_features)
    wanted = packed.linear(x)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(200):
            assert torch.equal(packed.linear(x), wanted)
    finally:
        torch.set_num_threads(before)


def test_callers_with_any_number_of_threads_do_not_meet() -> None:
    """Also more than there are cores, and from several threads of Python at once."""
    if not kernels.available():
        pytest.skip("no compiler here")
    packed = PackedWeight.from_dense(random(600, 400))  # large enough to be shared out
    x = random(9, 400)
    wanted, before = packed.linear(x), torch.get_num_threads()

    def work(threads: int) -> bool:
        torch.set_num_threads(threads)  # of this thread of Python
        return all(torch.equal(packed.linear(x), wanted) for _ in range(50))

    try:
        for counts in ((7,), (1, 2, 5, 9)):
            with ThreadPoolExecutor(len(counts)) as pool:
                assert all(pool.map(work, counts))
    finally:
        torch.set_num_threads(before)


def test_more_rows_than_are_taken_at_a_time() -> None:
    if not kernels.available():
        pytest.skip("no compiler here")
    packed, _ = MAKERS["Q4_0"]()
    wide = random(2053, packed.in_features + 4)
    x, bias, out = wide[:, 4:], random(packed.out_features), torch.zeros(2053, 50)
    place = out[:, 1 : 1 + packed.out_features]
    kernels.linear(packed.handle, x, place, bias=bias)
    for rows in (slice(0, 9), slice(1020, 1030), slice(2046, 2053)):
        assert torch.equal(place[rows], kernels.linear(packed.handle, x[rows], bias=bias))
    assert not out[:, 0].any() and not out[:, 1 + packed.out_features :].any()


def test_pytorch_alone_is_over_when_the_block_ends() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(ZeroDivisionError), kernels.pytorch_alone():
            assert torch.get_num_threads() == 1
            raise ZeroDivisionError
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_bias_sum_and_strides(variant: str) -> None:
    packed, weights = MAKERS["int4-64-zeros"]()
    wide = random(4, packed.in_features + 8)
    x, bias, out = wide[:, 8:], random(packed.out_features), random(4, packed.out_features + 3)
    before, place = out.clone(), out[:, 3:]
    kernels.linear(packed.handle, x, place, bias=bias, add=True)
    wanted = before[:, 3:] + x @ weights.T + bias
    torch.testing.assert_close(place, wanted, rtol=1e-3, atol=1e-3)
    assert torch.equal(out[:, :3], before[:, :3])


@pytest.mark.parametrize("width", [64, 75])
def test_norm_and_gate(variant: str, width: int) -> None:
    x, weight, up = random(5, width), random(width, seed=1), random(5, width, seed=2)
    for plus_one in (False, True):
        got = kernels.rms_norm(x, weight, 1e-5, plus_one)
        torch.testing.assert_close(got, plain.rms_norm(x, weight, 1e-5, plus_one))
    for kind in kernels.GATES:
        for scale in (1, 40):
            got = kernels.gated(x * scale, up, kind)
            torch.testing.assert_close(got, plain.gated(x * scale, up, kind), rtol=2e-6, atol=1e-6)
    assert kernels.rms_norm(x, weight, 1e-5, out=x) is x
    wanted = x + up
    kernels.add(up, x)
    assert torch.equal(x, wanted)


@pytest.mark.parametrize("loudness", [1.0, 1.3])
def test_angles(variant: str, loudness: float) -> None:
    positions, frequencies = torch.tensor([0, 1, 6, 1000, 131_071]), rope_frequencies(20, 1e4, None)
    wanted = angles(positions, frequencies, loudness)
    got = kernels.angles(positions, frequencies, loudness)
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-7)
    out = torch.full_like(got, torch.nan)
    assert kernels.angles(positions.int(), frequencies, loudness, out) is out
    assert torch.equal(out, got)


@pytest.mark.parametrize("turned", [32, 20])
def test_rope(variant: str, turned: int) -> None:
    joined = random(6, 3 * 32 + 5)
    cos_sin = angles(torch.tensor([0, 5, 6, 7, 1000, 3]), rope_frequencies(turned, 1e4, None))
    wanted, got = joined.clone(), joined.clone()
    plain.rope(wanted[:, 5:].view(6, 3, 32), cos_sin)
    kernels.rope(got[:, 5:].view(6, 3, 32), cos_sin)
    torch.testing.assert_close(got, wanted)


POOLS = [torch.float32, torch.bfloat16, torch.int8]


class Texts:
    """Three texts of different lengths in a pool whose pages are shuffled."""

    def __init__(self, dtype: torch.dtype, d: int, kv_heads: int = 2, group: int = 3) -> None:
        lengths = (37, 16, 5)
        pages = torch.randperm(8, generator=torch.Generator().manual_seed(3)).int()
        self.pages = torch.stack([pages[:3], pages[3:6], pages[5:8]])
        shape = (kv_heads, 8 * plain.PAGE, d)
        garbage = float("nan") if dtype.is_floating_point else 99
        self.keys = torch.full(shape, garbage, dtype=dtype)
        self.values = torch.full(shape, garbage, dtype=dtype)
        int8 = dtype == torch.int8
        self.scales = (
            [torch.full(shape[:2], float("nan")) for _ in range(2)] if int8 else [None, None]
        )
        self.text = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)]).int()
        self.position = torch.cat([torch.arange(n) for n in lengths]).int()
        page = self.pages[self.text.long(), self.position.long() // plain.PAGE]
        self.slots = page * plain.PAGE + self.position % plain.PAGE
        n = len(self.text)
        self.q = random(n, kv_heads * group, d)
        self.k, self.v = random(n, kv_heads, d, seed=1), random(n, kv_heads, d, seed=2)


@pytest.mark.parametrize("dtype", POOLS, ids=str)
@pytest.mark.parametrize("d", [64, 24])
def test_cache_and_attention(variant: str, dtype: torch.dtype, d: int) -> None:
    ours, twin = Texts(dtype, d), Texts(dtype, d)
    kernels.kv_write(ours.k, ours.v, ours.keys, ours.values, ours.slots, *ours.scales)
    plain.kv_write(twin.k, twin.v, twin.keys, twin.values, twin.slots, *twin.scales)
    made, wanted = [
        [pool for pool in (texts.keys, texts.values, *texts.scales) if pool is not None]
        for texts in (ours, twin)
    ]
    for a, b in zip(made, wanted, strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
    for window, softcap in ((0, 0.0), (7, 0.0), (20, 3.0)):
        some = torch.tensor([0, 1, 36, 37, 52, 57])  # now and then a query, as in decoding
        disorder = torch.randperm(37, generator=torch.Generator().manual_seed(1))
        for rows in (torch.arange(len(ours.q)), some, disorder):
            got, expected = [
                attend(
                    ours.q[rows], ours.keys, ours.values, ours.pages, ours.text[rows],
                    ours.position[rows], scale=0.3, window=window, softcap=softcap,
                    key_scales_ks=ours.scales[0], value_scales_ks=ours.scales[1],
                )
                for attend in (kernels.attend, plain.attend)
            ]  # fmt: skip
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_program_repeats_its_calls(variant: str) -> None:
    packed, weights = MAKERS["nf4"]()
    x, y = random(2, packed.in_features), torch.empty(2, packed.in_features)
    z, weight = torch.empty(2, packed.out_features), random(packed.in_features, seed=1)
    program = kernels.Program()
    with program.record():
        kernels.rms_norm(x, weight, 1e-5, out=y)
        kernels.linear(packed.handle, y, out=z)
    first = z.clone()
    x.copy_(random(2, packed.in_features, seed=5))
    program()
    assert not torch.equal(z, first)
    torch.testing.assert_close(z, plain.rms_norm(x, weight, 1e-5) @ weights.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_visible(variant: str, value: float) -> None:
    """In an int8 cache, and where weights are half precision."""
    pools = [torch.zeros(1, 32, 8, dtype=torch.int8) for _ in "kv"]
    scales = [torch.zeros(1, 32) for _ in "kv"]
    k, v = random(3, 1, 8), random(3, 1, 8, seed=1)
    k[1, 0, 5] = value
    kernels.kv_write(k, v, *pools, torch.arange(16, 19), *scales)
    pages, places = torch.tensor([[1]]), torch.arange(3)
    y = kernels.attend(
        random(3, 1, 8), *pools, pages, torch.zeros(3), places, scale=1.0,
        key_scales_ks=scales[0], value_scales_ks=scales[1],
    )  # fmt: skip
    assert y.isfinite().all((1, 2)).tolist() == [True, False, False]
    half = torch.tensor([[1.5, value, -2e-7, 65504.0]] * 3).half()
    packed = PackedWeight.from_dense(half)
    torch.testing.assert_close(packed.rows(torch.tensor([2])), half[2:].float(), equal_nan=True)
    assert not packed.linear(torch.ones(1, 4)).isfinite().any()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
def test_a_forked_process_has_threads_of_its_own() -> None:
    if not kernels.available():
        pytest.skip("no compiler here")
    code = (
        "import os, torch; torch.set_num_threads(2)\n"
        "from tests.quant.test_packed import MAKERS\n"
        "packed, weights = MAKERS['Q4_K']()\n"
        "x = torch.randn(99, packed.in_features)\n"
        "wanted = packed.linear(x)\n"
        "for _ in range(3):\n"
        "    child = os.fork()\n"
        "    if child == 0: os._exit(not torch.equal(packed.linear(x), wanted))\n"
        "    assert torch.equal(packed.linear(x), wanted)\n"
        "    assert os.waitpid(child, 0)[1] == 0\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
def test_two_threads_of_a_forked_process_may_be_first_at_once() -> None:
    """Neither may meet the workers of the first process, who are not there to let go of a lock."""
    if not kernels.available():
        pytest.skip("no compiler here")
    code = (
        "import os, signal, threading\n"
        "import torch; torch.set_num_threads(3)\n"
        "from llm_from_scratch.quant import kernels\n"
        "x = torch.rand(300, 300)\n"
        "program = kernels.Program()\n"
        "with program.record():\n"
        "    for _ in range(20): kernels.rms_norm(x, x[0], 1e-5, out=torch.empty_like(x))\n"
        "def child():\n"
        "    signal.alarm(20)\n"
        "    both = threading.Barrier(2)\n"
        "    def work(): both.wait(); program()\n"
        "    threads = [threading.Thread(target=work) for _ in 'ab']\n"
        "    for one in threads: one.start()\n"
        "    for one in threads: one.join()\n"
        "    os._exit(0)\n"
        "for _ in range(100):\n"
        "    program()\n"
        "    pid = os.fork()\n"
        "    if pid == 0: child()\n"
        "    assert os.waitpid(pid, 0)[1] == 0\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's limits")
def test_where_the_system_gives_no_threads_one_does_it_all() -> None:
    if not kernels.available():
        pytest.skip("no compiler here")
    code = (
        "import resource, torch\n"
        "from tests.quant.test_packed import MAKERS\n"
        "packed, weights = MAKERS['Q4_K']()\n"
        "x = torch.randn(9, packed.in_features)\n"
        "wanted = packed.linear(x)\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**20, -1))\n"  # less than a stack
        "torch.set_num_threads(2)\n"
        "for _ in range(3): assert torch.equal(packed.linear(x), wanted)\n"
        "assert len(__import__('os').listdir('/proc/self/task')) == 1\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment)


def test_without_a_compiler_the_twin_stands_in(tmp_path: Path) -> None:
    code = (
        "import torch; from tests.quant.test_packed import MAKERS\n"
        "packed, weights = MAKERS['Q4_K']()\n"
        "x = torch.randn(3, packed.in_features)\n"
        "for _ in range(2): assert torch.equal(packed.linear(x), x @ weights.T)\n"
    )

    def run(**variables: str) -> str:
        environment = {**os.environ, "SCRATCHLM_CACHE": str(tmp_path), **variables}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    assert run(SCRATCHLM_KERNELS="off") == ""
    said = run(CXX="no-such-compiler")
    assert said.count("no-such-compiler") == 1
    assert "plain PyTorch stands in" in said
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'error: nothing works' >&2\nexit 1\n", encoding="utf-8")
    broken.chmod(0o755)
    if os.name != "nt":
        assert "error: nothing works" in run(CXX=str(broken))
    assert not list(tmp_path.glob("kernels/*"))


def test_a_broken_library_is_built_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not kernels.available():
        pytest.skip("no compiler here")
    monkeypatch.setenv("SCRATCHLM_CACHE", str(tmp_path))
    monkeypatch.delenv("SCRATCHLM_QUIET", raising=False)
    path = build.library_path(build.find_compiler())
    path.parent.mkdir(parents=True)
    path.write_bytes(b"cut short")
    assert build.load().instructions is not None
    assert "this happens once" in capsys.readouterr().err  # it takes seconds
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_libraries_that_nobody_uses_any_more_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernels.available():
        pytest.skip("no compiler here")
    monkeypatch.setenv("SCRATCHLM_CACHE", str(tmp_path))
    path = build.library_path(build.find_compiler())
    build.make_folder(path.parent)
    for age in range(1, build.KEPT + 3):
        old = path.with_name(f"{age}.so")
        old.touch()
        os.utime(old, (1e9 - age, 1e9 - age))
    killed, busy = (path.with_name(f"{ASIDE}{name}") for name in ("killed", "busy"))
    killed.mkdir()
    busy.mkdir()
    os.utime(killed, (1e9, 1e9))
    build.load()
    kept = {path.name, busy.name, *(f"{age}.so" for age in range(1, build.KEPT))}
    assert {entry.name for entry in path.parent.iterdir()} == kept
    os.utime(path, (1, 1))
    build.load()  # not built again, but used
    assert path.stat().st_mtime > 1e9
    build.drop_old(path.parent)
    assert path.exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has other rights")
def test_a_library_that_others_can_write_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernels.available():
        pytest.skip("no compiler here")
    monkeypatch.setenv("SCRATCHLM_CACHE", str(tmp_path))
    made: list[Path] = []

    def compile_to(path: Path, *_: object) -> None:
        made.append(path)
        raise build.NoKernels("asked to build it")

    path = build.library_path(build.find_compiler())
    monkeypatch.setattr(build, "compile_to", compile_to)
    build.make_folder(path.parent)
    assert path.parent.stat().st_mode & 0o777 == 0o700
    path.write_bytes(b"planted")
    path.chmod(0o777)
    with pytest.raises(build.NoKernels, match="asked to build it"):
        build.load()
    assert made == [path]
    path.parent.chmod(0o777)
    with pytest.raises(build.NoKernels, match="others may write to"):
        build.load()
    assert made == [path]
