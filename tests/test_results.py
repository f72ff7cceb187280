"""What commands print for people: sentences and short tables, never a dump of what --json is for."""

from lowvram_tuner import cli, results


def test_a_plan_is_a_table_and_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr("lowvram_tuner.hardware.card.read_card", lambda: None)
    assert cli.main(["plan", "--model", "meta-llama/Llama-3.1-8B-Instruct", "--vram-gb", "24"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Planned for a card of 24 GB that is not in this machine")
    *parts, process = [float(line.split()[-2]) for line in lines[1:-1]]
    assert abs(sum(parts) - process) < 0.05 and process <= 24, "each part is rounded to 0.01"
    assert lines[-1].startswith("It fits: 4-bit nf4, activations kept") and "not in this machine" not in lines[-1]


def test_a_plan_that_does_not_fit_says_what_would(monkeypatch, capsys):
    monkeypatch.setattr("lowvram_tuner.hardware.card.read_card", lambda: None)
    assert cli.main(["plan", "--model", "Qwen/Qwen3-8B", "--vram-gb", "2", "--micro-batch-size", "8", "--max-seq-length", "2048"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("Too big by ") and "This would fit: " in last


def test_a_quantized_model_names_its_worst_weight_and_the_next_step(capsys):
    layers = [{"name": f"model.layers.{i}.mlp.down_proj", "error": i / 1000, "damping": 0.1 if i == 3 else 0.0, "seconds": 1.0} for i in range(200)]
    results.show_quantized({"output": "qwen-3bit", "seconds": 754.0, "peak_allocated_gb": 1.5, "layers": layers})
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "Written to qwen-3bit in 13 min; it took at most 1.50 GB."
    assert "200 weights; the largest error, 19.90%, is that of model.layers.199.mlp.down_proj." in out
    assert "1 needed more damping: model.layers.3.mlp.down_proj." in out and out.endswith("train --model qwen-3bit\n")
    assert len(out) < 400


def test_a_benchmark_tells_its_plan_in_words_and_nothing_that_was_not_measured(capsys):
    results.show_bench({"step_ms": 63.04, "gpu_ms": 0.0, "captured": False, "capture_failed": "", "plan": {"keep_all": 2, "words": ("4-bit nf4", "word table in RAM")}, "profile": {"top": [1] * 99}})
    assert capsys.readouterr().out == "step_ms: 63.04\ncaptured: False\nplan: 4-bit nf4, word table in RAM\n"
