"""The recipes at tiny sizes, on the real packaged assets where these are installed."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("tqdm", reason="needs pip install 'gapaware[recipes]'")
pytest.importorskip("matplotlib", reason="needs pip install 'gapaware[recipes]'")

from recipes import assets, escape_grokking
from recipes.table import table


@pytest.fixture(autouse=True)
def one_thread():
    """The matrices are tiny: threads only get in each other's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def packaged():
    try:
        return assets.minilm(), assets.bbc_news(), assets.tweets()
    except assets.MissingAssetError as missing:
        pytest.skip(str(missing))


# -- assets --------------------------------------------------------------------------------------


def test_missing_package_says_how_to_install_it():
    with pytest.raises(assets.MissingAssetError, match=r"pip install --no-deps -r recipes/req"):
        assets.locate("no-such-package", "no_such_module", "data")


def test_missing_file_in_an_installed_package():
    with pytest.raises(assets.MissingAssetError, match="pip install --no-deps"):
        assets.locate("torch", "torch", "no/such/file")


def test_packaged_corpora(packaged):
    model, news, tweets = packaged
    assert (model / "model.safetensors").is_file()
    assert news.classes == ["business", "entertainment", "politics", "sports", "tech"]
    assert tweets.classes == ["negative", "neutral", "positive"]
    for corpus in (news, tweets):
        assert len(set(corpus.texts)) == len(corpus.texts) == len(corpus.labels) > 2000
        held_out = set(corpus.held_out(400).texts)
        lessons = corpus.sample(640, seed=1, held_out=400)
        assert len(lessons.texts) == 640
        assert not held_out & set(lessons.texts)
        assert lessons.texts != corpus.sample(640, seed=2, held_out=400).texts
        assert len(set(lessons.labels)) == len(corpus.classes)


def test_held_out_set_may_not_take_everything():
    corpus = assets.Classification("toy", ["a", "b"], [0, 1], ["x", "y"])
    assert len(corpus.sample(10, seed=0, held_out=1).texts) == 1
    with pytest.raises(ValueError, match="held_out=2"):
        corpus.sample(1, seed=0, held_out=2)


def test_unknown_data_set_without_datasets(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ImportError, match=r"'imdb' is none of the packaged.*pip install datasets"):
        assets.classification("imdb")


# -- table ---------------------------------------------------------------------------------------


def test_table_aligns_numbers_to_the_right():
    lines = table(["method", "n"], [["a", "100"], ["longer one", "2"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[-1].endswith("  2")


# -- grokking ------------------------------------------------------------------------------------


def test_grokking_runs_alike_until_gapaware_acts():
    settings = escape_grokking.Settings(modulus=7, hidden=16, width=8, budget=20)

    def adamw(model):
        return torch.optim.AdamW(model.parameters(), lr=settings.lr)

    def observed(model):
        return escape_grokking.GapAware(adamw(model), mode="observe")

    alone = escape_grokking.grok("AdamW", adamw, 0, settings)
    watched = escape_grokking.grok("GapAware (observe)", observed, 0, settings)
    assert watched.train_accuracy == alone.train_accuracy
    assert watched.held_out_accuracy == alone.held_out_accuracy
    assert watched.gapaware_seconds > 0


def test_halves_of_all_sums_do_not_overlap():
    known, sums, held_out, held_out_sums = escape_grokking.all_sums(7, seed=0)
    pairs = {tuple(pair.tolist()) for pair in torch.cat([known, held_out])}
    assert len(pairs) == 49
    assert torch.equal(sums, known.sum(1) % 7)
    assert torch.equal(held_out_sums, held_out.sum(1) % 7)


def test_grokking_command_line(tmp_path, capsys):
    escape_grokking.main(["--budget", "60", "--seeds", "0", "1", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "AdamW" in printed
    assert "> 60" in printed
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [(run["method"], run["seed"]) for run in results] == [
        ("AdamW", 0),
        ("GapAware (auto)", 0),
        ("AdamW", 1),
        ("GapAware (auto)", 1),
    ]
    assert (tmp_path / "auto-seed1.jsonl").read_text().count("\n") > 3


def test_grokking_needs_steps_to_score(tmp_path, capsys):
    with pytest.raises(SystemExit) as leaving:
        escape_grokking.main(["--budget", "5", "--output", str(tmp_path)])
    assert leaving.value.code == 2
    assert "--budget 5: the score is taken every 10 steps" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# -- fine-tuning ---------------------------------------------------------------------------------


@pytest.fixture
def tiny_encoder(tmp_path, packaged):
    """A random two-layer BERT with MiniLM's tokenizer, saved as a model of the hub would be."""
    transformers = pytest.importorskip(
        "transformers", reason="needs pip install 'gapaware[transformers]'"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(packaged[0])
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    folder = tmp_path / "encoder"
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_finetune_command_line(tiny_encoder, tmp_path, capsys):
    from recipes import finetune_minilm

    output = tmp_path / "out"
    command = f"--mode auto observe --seeds 0 1 --steps 6 --held-out 40 --output {output}"
    results = finetune_minilm.main([*command.split(), "--model", str(tiny_encoder)])
    printed = capsys.readouterr().out
    methods = [
        "AdamW",
        "AdamW, consolidated",
        "AdamW, lr / 10",
        "GapAware (auto)",
        "GapAware (observe)",
    ]
    for text in (*methods, "in gapaware", "scores.png"):
        assert text in printed
    assert "GapAware (auto), seed 1: the factor stayed at 1 (too few updates yet)" in printed
    assert (output / "scores.png").stat().st_size > 10_000
    saved = json.loads((output / "results.json").read_text())
    assert saved["settings"]["steps"] == 6
    assert [(run["method"], run["seed"]) for run in saved["results"]] == [
        (method, seed) for seed in (0, 1) for method in methods
    ]

    alone, consolidated, small, _, observed = results[:5]
    assert consolidated.old_before == alone.old_before
    assert consolidated.scores == []
    assert observed.scores == alone.scores
    assert observed.learning_rates == alone.learning_rates
    assert len(alone.learning_rates) == alone.steps == 6
    assert [point["step"] for point in alone.scores] == [0, 6]
    assert small.scores[0] == alone.scores[0]
    assert small.learning_rates == pytest.approx([lr / 10 for lr in alone.learning_rates])
    assert alone.idle is None
    assert observed.gapaware_seconds > 0 == alone.gapaware_seconds
    assert (output / "auto-seed1.jsonl").is_file()


def test_finetune_the_real_model(packaged, tmp_path):
    from recipes import finetune_minilm

    settings = finetune_minilm.Settings(
        old_steps=2, steps=2, batch_size=4, held_out=20, score_every=2
    )
    _, news, tweets = packaged
    runs = finetune_minilm.compare(news, tweets, ["retain"], [0], tmp_path, settings)
    by_method = {run.method: run for run in runs}
    alone, wrapped = by_method["AdamW"], by_method["GapAware (retain)"]
    assert alone.old_before == wrapped.old_before
    assert wrapped.steps == 2
    assert "GapAware (retain), consolidated" in by_method
    assert 0 < wrapped.gapaware_seconds < wrapped.seconds
