"""The benchmark of the operator prints and writes what it measured."""

import json

import pytest

from ops import benchmark


def test_the_benchmark_writes_times_and_errors_of_every_candidate(tmp_path, capsys):
    file = tmp_path / "numbers.json"
    arguments = "--what operator --shapes dec300 --repeats 1 --devices cpu --backends reference --dtypes fp32 --json"
    benchmark.main([*arguments.split(), str(file)])
    report = json.loads(file.read_text())
    assert [(row["shape"], row["mode"], row["candidate"], row["ratio"]) for row in report["times"]] == [
        ("dec300", "forward", "reference", 1.0),
        ("dec300", "forward+backward", "reference", 1.0),
    ]
    assert all(0 < row["least"] <= row["median"] <= row["most"] for row in report["times"])
    (errors,) = report["errors"]
    assert errors["candidate"] == "reference" and errors["same_bits"]
    assert 0 < errors["output"] < 1e-5 and 0 < errors["grad value"] < 1e-5
    printed = capsys.readouterr().out
    assert "CPU: " in printed and "| dec300 | forward+backward | reference |" in printed


def test_the_benchmark_compares_the_layer_with_and_without_the_fused_operator(tmp_path):
    file = tmp_path / "numbers.json"
    arguments = "--what layer --shapes dec300 --repeats 1 --devices cpu --backends reference --dtypes bf16 --json"
    benchmark.main([*arguments.split(), str(file)])
    report = json.loads(file.read_text())
    rows = report["layers"]
    assert report["figures"] == []  # nothing compiled was measured
    assert all(row["ratio_least"] <= row["ratio"] * 1.001 and row["ratio"] <= row["ratio_most"] * 1.001 for row in rows)
    assert [(row["mode"], row["way"]) for row in rows] == [
        (mode, way) for mode in benchmark.MODES for way in ("unfused", "fused")
    ]
    assert all(0 < row["least"] <= row["median"] <= row["most"] for row in rows)
    assert rows[1]["kept"] < rows[0]["kept"]


def test_a_figure_compares_the_reference_with_the_first_compiled_candidate():
    def row(mode, candidate, seconds, gain):
        spread = (seconds, 0.5 * seconds, 2 * seconds, gain, gain / 2, gain * 2)
        return benchmark.Row("enc800", mode, "bf16", 2, candidate, "cpu", "perf_counter", *spread)

    rows = [row("forward", "reference", 0.1, 1.0), row("forward", "cpu avx2", 0.002, 50.0)]
    rows += [row("forward", "cpu portable", 0.004, 25.0), row("forward+backward", "reference", 0.4, 1.0)]
    (figure,) = benchmark.figures("operator", rows, benchmark.parse(["--batch", "3", "--dist", "uniform"]))
    case = {"shape": "enc800", "mode": "forward", "dtype": "bf16", "device": "cpu", "threads": 2, "batch": 3}
    assert figure["case"] == case | {"dist": "uniform"} and figure["way"] == "cpu avx2"
    assert (figure["plain"], figure["ours"]) == ([100.0, 50.0, 200.0], [2.0, 1.0, 4.0])
    assert figure["times_as_fast"] == [50.0, 25.0, 100.0]


def test_a_figure_of_the_layer_compares_the_fused_way_with_the_other():
    def row(backend, way, seconds, kept):
        spread = (seconds, seconds, seconds, 0.3 / seconds, kept, "cuda", 1.0, 2.0)
        return benchmark.benchmark_layer.LayerRow("dec300", "forward", "fp16", backend, 1, way, *spread)

    rows = [row("cuda", "unfused", 0.3, 7), row("cuda", "fused", 0.2, 5)]
    (figure,) = benchmark.figures("layer", rows, benchmark.parse([]))
    assert figure["case"]["device"] == "cuda" and figure["case"]["threads"] == 0
    assert (figure["plain"][0], figure["ours"][0], figure["kept"]) == (300.0, 200.0, [7, 5])
    assert figure["times_as_fast"] == [1.5, 1.0, 2.0]
    rows = [row("reference", "unfused", 0.3, 7), row("reference", "fused", 0.2, 5)]
    assert benchmark.figures("layer", rows, benchmark.parse([])) == []


@pytest.mark.parametrize("dist", ["model", "uniform"])
def test_locations_lie_mostly_on_the_image(dist):
    _, locations, weights, _ = benchmark.draw(1, 50, dist, benchmark.DTYPES["fp32"], "cpu")
    outside = ((locations < 0) | (locations > 1)).any(-1).float().mean()
    assert locations.shape == (1, 50, 8, 4, 4, 2) and 0 < outside < 0.3
    assert weights.sum((-1, -2)).sub(1).abs().max() < 1e-5


def test_a_number_below_one_is_refused(capsys):
    with pytest.raises(SystemExit):
        benchmark.parse(["--threads", "1", "0"])
    assert "--threads [1, 0]: must be at least 1" in capsys.readouterr().err
