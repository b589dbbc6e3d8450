"""Ways of running a teacher: timed, compared, compiled, written as ONNX files."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import ferkd_data as fd
from ferkd_data.bench import ASKED_AT_ONCE, TeacherTimings, Timing, _measure, advice
from ferkd_data.builder.labelling.forwards import Forwards
from ferkd_data.errors import TeacherError, UsageError
from ferkd_data.teachers import load_teacher
from ferkd_data.teachers.compiled import compile_teachers
from ferkd_data_cli.main import run


@pytest.fixture(scope="module")
def exported(tiny_teachers, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "tiny.onnx"
    return fd.export_teacher(f"{tiny_teachers}?weight=2&temperature=3", path)


def test_every_way_is_timed_and_compared(tiny_teachers, monkeypatch):
    monkeypatch.setattr("ferkd_data.teachers.compiled.BACKEND", "eager")
    (found,) = fd.bench_teachers([tiny_teachers], batch_sizes=[2, 4], threads=[1], seconds=0.002).teachers
    timed = [(timing.way, timing.batch_size) for timing in found.timings]
    ways = ("eager", "channels-last", "onnx")
    assert sorted(timed[:-1]) == sorted((way, size) for way in ways for size in (2, 4))
    assert timed[-1][0] == "compile" and found.failures == {}
    assert max(timing.ratio for timing in found.timings if timing.way == "eager") == 1
    assert all(timing.crops_per_second > 0 and timing.largest_difference < 1e-5 for timing in found.timings)


def test_the_exported_file_says_the_same_and_keeps_its_options(tiny_teachers, exported):
    assert (exported.kind, exported.weight, exported.temperature) == ("onnx", 2.0, 3.0)
    batch = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    eager, fast = load_teacher(fd.TeacherSpec.parse(tiny_teachers)), load_teacher(exported)
    torch.testing.assert_close(fast.logits(batch), eager.logits(batch), atol=1e-4, rtol=1e-4)
    assert fast.preprocessing == eager.preprocessing


def test_a_file_that_would_say_something_else_is_not_written(tiny_teachers, tmp_path):
    with pytest.raises(TeacherError, match=r":another_when_exported: its ONNX form differs by 0\.\d+ in a prob"):
        fd.export_teacher("python:odd_teachers:another_when_exported", tmp_path / "odd.onnx")
    assert not list(tmp_path.glob("*.onnx*")) and not list(tmp_path.glob(".*"))


def test_an_onnx_teacher_is_timed_as_it_is(exported, capsys):
    assert run(["bench", "--teacher", str(exported), "--seconds", "0.002", "--batch-sizes", "3", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["teachers"]
    assert {timing["way"] for timing in found["timings"]} == {"as it is"}
    assert found["advice"].startswith("build --batch-size 3")


def test_the_command_prints_a_table_and_refuses_what_makes_no_sense(exported, tmp_path, capsys):
    teacher = ["bench", "--teacher", str(exported)]
    assert run([*teacher, "--seconds", "0.002", "--threads", "1", "--batch-sizes", "2"]) == 0
    assert "crops/s" in capsys.readouterr().out
    for more, status in (
        (["--batch-sizes", "two"], 2),
        (["--seconds", "0"], 2),
        (["--threads", "0"], 2),
        (["--teacher", str(exported), "--export", str(tmp_path / "x.onnx")], 2),
        (["--export", str(tmp_path / "x.onnx")], 1),
    ):
        assert run([*teacher, *more]) == status
    assert "only PyTorch modules can be written" in capsys.readouterr().err


def test_batches_that_do_not_fit_are_named_and_the_others_timed(tiny_teachers, monkeypatch, capsys):
    monkeypatch.setattr("ferkd_data.bench.CHECKED_CROPS", 8)
    command = [
        "bench",
        "--teacher",
        "python:greedy_teachers:greedy_of_eight",
        "--seconds",
        "0.002",
        "--threads",
        "1",
        "--no-compile",
    ]
    assert run([*command, "--batch-sizes", "4,8,16,32"]) == 0
    out = capsys.readouterr().out
    assert "channels-last, batch 16: not measured: out of memory" in out and "--batch-size" in out
    (found,) = fd.bench_teachers(
        ["python:greedy_teachers:greedy_of_eight"], batch_sizes=[8, 16], threads=[1], seconds=0.002
    ).teachers
    assert {timing.batch_size for timing in found.timings if timing.way != "onnx"} == {8}
    with pytest.raises(TeacherError, match="too little memory for any of"):
        fd.bench_teachers(["python:greedy_teachers:greedy_of_eight"], batch_sizes=[16], threads=[1], seconds=0.002)


def timings(**rates):
    ways = [
        Timing(way=way, batch_size=size, threads=threads, crops_per_second=rate, ratio=1, largest_difference=0)
        for way, (size, threads, rate) in {name.replace("_", "-"): value for name, value in rates.items()}.items()
    ]
    return TeacherTimings(spec="timm:x?weight=2", timings=tuple(ways), failures={}, advice="")


def test_advice():
    assert advice(timings(channels_last=(8, 4, 100), onnx=(4, 1, 100)), cores=4).startswith(
        "build --teacher onnx:FILE.onnx (ferkd-data bench --teacher 'timm:x?weight=2' --export FILE.onnx writes it) "
        "--batch-size 4 --workers 4: 4.0 times"
    )
    assert advice(timings(channels_last=(8, 4, 100), compile=(8, 4, 150)), cores=4).startswith("build --compile --bat")
    sizes = [
        timings(channels_last=(size, 4, rate)).timings[0] for size, rate in ((64, 90), (128, 98), (256, 99), (512, 100))
    ]
    assert advice(replace(timings(channels_last=(64, 4, 90)), timings=tuple(sizes)), cores=4) == (
        "build --batch-size 128: nothing else is much faster"
    ), "the smallest of those that are as good as the fastest"
    assert advice(timings(channels_last=(8, 4, 100), compile=(8, 4, 105)), cores=4) == (
        "build --batch-size 8: nothing else is much faster"
    )


def test_a_teacher_too_large_to_be_compiled_is_compiled_for_fewer(tiny_teachers, monkeypatch):
    teacher = load_teacher(fd.TeacherSpec.parse(tiny_teachers))
    sizes = []

    def backend(graph, inputs):
        sizes.extend(len(x) for x in inputs if isinstance(x, torch.Tensor) and x.ndim == 4)
        if sizes[-1] > 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return graph.forward

    monkeypatch.setattr("ferkd_data.teachers.compiled.BACKEND", backend)
    torch._dynamo.reset()
    (compiled,) = compile_teachers([teacher], 16)
    batch = torch.randint(0, 256, (13, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(Forwards().logits(compiled, batch), teacher.logits(batch))
    assert sizes == [16, 8, 4], "and what comes later in larger batches is cut, not compiled anew"


def test_memory_that_runs_out_before_the_network_is_asked(tiny_teachers, monkeypatch, compilations):
    from ferkd_data.normalization import scaled

    teacher = load_teacher(fd.TeacherSpec.parse(tiny_teachers))
    asked = []

    def most(room):
        def scaled_in_little_memory(images, *how):
            asked.append(len(images))
            # The loop that this test found has no end.
            assert len(asked) < 20
            if len(images) > room:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return scaled(images, *how)

        return scaled_in_little_memory

    monkeypatch.setattr("ferkd_data.teachers.module_teacher.scaled", most(4))
    compile_teachers([teacher], 16)
    assert asked == [16, 8, 4] and compilations == [4]
    monkeypatch.setattr("ferkd_data.teachers.module_teacher.scaled", most(0))
    with pytest.raises(TeacherError, match=r"first: cannot be compiled \(OutOfMemoryError: CUDA out of memory\)"):
        compile_teachers([teacher], 16)
    assert asked[3:] == [16, 8, 4, 2, 1]


@pytest.fixture
def compilations(monkeypatch):
    """The batch sizes of the networks that were compiled."""
    sizes = []

    def backend(graph, inputs):
        sizes.extend(len(x) for x in inputs if isinstance(x, torch.Tensor) and x.ndim == 4)
        return graph.forward

    monkeypatch.setattr("ferkd_data.teachers.compiled.BACKEND", backend)
    torch._dynamo.reset()
    return sizes


def test_a_compiled_build_compiles_once_and_writes_the_same(photos, tiny_teachers, tmp_path, label_set, compilations):
    from label_sets import SMALL, same_label_sets

    fd.build(photos, tmp_path / "plain", teachers=[tiny_teachers], batch_size=32, **SMALL)
    fd.build(photos, tmp_path / "out", teachers=[tiny_teachers], batch_size=32, compile=True, **SMALL)
    assert compilations == [32], "80 crops in a shard end with a short batch"
    assert same_label_sets(tmp_path / "plain", tmp_path / "out")


def test_nothing_to_compile_is_an_error(exported, photos, tmp_path, compilations):
    with pytest.raises(UsageError, match="cannot be compiled"):
        fd.build(photos, tmp_path / "out", teachers=[exported], compile=True, top_k=2)


def test_a_compiler_that_fails_names_the_teacher(photos, tiny_teachers, tmp_path, monkeypatch):
    def backend(graph, inputs):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr("ferkd_data.teachers.compiled.BACKEND", backend)
    torch._dynamo.reset()
    with pytest.raises(TeacherError, match=r"ferkd_tiny_teachers:first: cannot be compiled .*drop --compile"):
        fd.build(photos, tmp_path / "out", teachers=[tiny_teachers], compile=True, top_k=2)


def test_a_compiled_teacher_that_runs_out_of_memory_is_compiled_for_half(tiny_teachers, compilations):
    teacher = load_teacher(fd.TeacherSpec.parse(tiny_teachers))
    (compiled,) = compile_teachers([teacher], 8)
    network = compiled.module.module

    def too_large(images):
        if len(images) > 4:
            raise torch.cuda.OutOfMemoryError
        return network(images)

    compiled.module.module = too_large
    batch = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(Forwards().logits(compiled, batch), teacher.logits(batch))
    assert compilations == [8, 4]


class OnAGpu:
    """A batch that only says where it lies."""

    device = torch.device("cuda")

    def __len__(self):
        return 3


def test_a_gpu_is_asked_for_several_batches_before_it_is_waited_for():
    asked = []

    class Teacher:
        def logits(self, batch):
            asked.append(len(asked))
            return torch.zeros(len(batch), 10)

    assert _measure(Teacher(), OnAGpu(), 1e-9) > 0
    assert len(asked) == ASKED_AT_ONCE
    assert _measure(Teacher(), torch.zeros(3, 3, 8, 8), 1e-9) > 0
    assert len(asked) == ASKED_AT_ONCE + 1
