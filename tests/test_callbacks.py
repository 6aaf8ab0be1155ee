"""The live measurement against the comparison of checkpoints saved at the same steps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import peft
import pytest
import torch
import transformers
from torch import nn
from torch.distributed.tensor import DTensor

import wda
from wda.adapters import AdapterConfig, inject, save_adapter
from wda.callbacks import DecompositionCallback
from wda.callbacks.live import find_weights
from wda.errors import LocationError, ModelError, OutputError, SelectionError

STEPS = [2, 3, 5]


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        vocab_size=15,
        max_position_embeddings=16,
    )
    return transformers.BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=24, n_layer=2, n_head=4, vocab_size=15, n_positions=16, pad_token_id=0
    )
    return transformers.GPT2ForSequenceClassification(config)


def texts(count: int = 48) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(1, 15, (8,), generator=generator), "labels": i % 2}
        for i in range(count)
    ]


def arguments(folder: Path, **changes: Any) -> transformers.TrainingArguments:
    options: dict[str, Any] = {
        "max_steps": 5,
        "learning_rate": 2e-2,
        "per_device_train_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 11,
        **changes,
    }
    return transformers.TrainingArguments(str(folder), **options)


def train(
    model: nn.Module, folder: Path, callback: transformers.TrainerCallback, **changes: Any
) -> transformers.Trainer:
    trainer = transformers.Trainer(
        model, arguments(folder, **changes), train_dataset=texts(), callbacks=[callback]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return trainer


class SaveOurs(transformers.TrainerCallback):
    """Saves our adapters at every step."""

    def __init__(self, config: AdapterConfig, base: Path) -> None:
        self.config, self.base = config, base

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        save_adapter(kwargs["model"], self.config, folder, str(self.base))


def compared(run: Path, base: Path, **options: Any) -> pd.DataFrame:
    table = wda.compare(run, base=base, cache=False, progress=False, **options).table
    return table[table["step"].isin(STEPS)].reset_index(drop=True)


def assert_same_rows(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    """Every column that the comparison fills is the same; the seed it cannot know."""
    known = [c for c in expected if not expected[c].isna().all()]
    assert {"run", "method", "step", "module", "layer", "delta_m", "delta_d", "dtype"} <= set(known)
    assert (expected["delta_m"] > 1e-4).all() and (expected["delta_d"] > 1e-7).all()
    pd.testing.assert_frame_equal(found[known], expected[known], rtol=1e-9, atol=1e-15)
    assert set(found["seed"]) == {11}


@pytest.mark.parametrize("per", ["output", "input"])
@pytest.mark.parametrize("make", [bert, gpt2])
def test_full_fine_tuning_is_measured_as_its_checkpoints_are(
    make: Any, per: str, tmp_path: Path
) -> None:
    model = make()
    model.save_pretrained(tmp_path / "base")
    callback = DecompositionCallback(STEPS, per=per)  # type: ignore[arg-type]
    train(model, tmp_path / "ft", callback, gradient_accumulation_steps=2)
    assert_same_rows(callback.table, compared(tmp_path / "ft", tmp_path / "base", per=per))
    assert len(callback.table) == 3 * 2 * 2


@pytest.mark.parametrize("per", ["output", "input"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("make", [bert, gpt2])
def test_pefts_adapters_are_measured_as_their_checkpoints_are(
    make: Any, dora: bool, per: str, tmp_path: Path
) -> None:
    model = make()
    model.save_pretrained(tmp_path / "base")
    targets = ["query", "value"] if make is bert else ["c_attn"]
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=targets, use_dora=dora)
    callback = DecompositionCallback(STEPS, per=per)  # type: ignore[arg-type]
    train(peft.get_peft_model(model, config), tmp_path / "run", callback)
    assert_same_rows(callback.table, compared(tmp_path / "run", tmp_path / "base", per=per))
    assert set(callback.table["method"]) == {"dora" if dora else "lora"}
    assert set(callback.table["rank"]) == {3}


def test_transposed_weights_are_known_by_their_modules(tmp_path: Path) -> None:
    """Not by names beside them: where only c_fc is adapted, there is no c_attn."""
    model = gpt2()
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=3, target_modules=["c_fc"], fan_in_fan_out=True)
    callback = DecompositionCallback(STEPS, matrices="up")
    train(peft.get_peft_model(model, config), tmp_path / "run", callback)
    expected = compared(tmp_path / "run", tmp_path / "base", matrices="up")
    assert_same_rows(callback.table, expected)
    assert set(callback.table["out_features"]) == {96}


@pytest.mark.parametrize("method", ["lora", "dora", "vera", "dvora"])
def test_our_adapters_are_measured_as_their_checkpoints_are(method: Any, tmp_path: Path) -> None:
    model = bert()
    model.save_pretrained(tmp_path / "base")
    alpha = {} if method in ("vera", "dvora") else {"alpha": 7}
    config = AdapterConfig(method=method, rank=3, **alpha)
    inject(model, config)
    callback = DecompositionCallback(STEPS)
    trainer = transformers.Trainer(
        model,
        arguments(tmp_path / "run", save_strategy="no"),
        train_dataset=texts(),
        callbacks=[callback, SaveOurs(config, tmp_path / "base")],
    )
    trainer.train()
    assert_same_rows(callback.table, compared(tmp_path / "run", tmp_path / "base"))
    assert set(callback.table["method"]) == {method}


@pytest.mark.parametrize("method", ["series", "parallel", "weightnorm"])
def test_what_is_not_measured_is_refused_and_not_called_ft(method: Any) -> None:
    model = bert()
    inject(model, AdapterConfig(method=method))
    with pytest.raises(ModelError, match=r"query, .* neither is measured while it trains; save"):
        find_weights(model)


def test_measuring_changes_nothing_of_the_training(tmp_path: Path) -> None:
    losses, weights = [], []
    for callback in (transformers.TrainerCallback(), DecompositionCallback(every=1)):
        model = bert()
        trainer = train(model, tmp_path / "ft", callback, save_strategy="no")
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert losses[0] == losses[1] and len(losses[0]) == 2
    assert torch.equal(weights[0], weights[1])


def test_every_measures_at_the_end_too() -> None:
    state, control = transformers.TrainerState(), transformers.TrainerControl()
    callback = DecompositionCallback(every=2)
    assert [s for s in range(1, 6) if callback._is_chosen(s, control)] == [2, 4]
    control.should_training_stop = True
    assert callback._is_chosen(5, control)
    assert state.global_step == 0


def test_means_go_where_the_trainer_reports_to(tmp_path: Path) -> None:
    heard: list[dict[str, float]] = []

    class Listener(transformers.TrainerCallback):
        def on_log(self, *_: Any, logs: dict[str, float], **kwargs: Any) -> None:  # noqa: ARG002
            heard.append(dict(logs))

    trainer = transformers.Trainer(
        bert(),
        arguments(tmp_path / "ft", save_strategy="no"),
        train_dataset=texts(),
        callbacks=[Listener],  # as the reporters do, it comes before ours
    )
    callback = DecompositionCallback(steps=[2, 3], matrices="query, key", log=trainer.log)
    trainer.add_callback(callback)
    trainer.train()
    ours = [logs for logs in heard if "wda/delta_m/query" in logs]
    assert [set(logs) - {"epoch"} for logs in ours] == 2 * [
        {"wda/delta_m/query", "wda/delta_d/query", "wda/delta_m/key", "wda/delta_d/key"}
    ]
    table = callback.table
    for step, logs in zip((2, 3), ours, strict=True):
        rows = table[table["step"] == step]
        for name in ("query", "key"):
            of = rows[rows["matrix"] == name]
            assert len(of) == 2
            assert logs[f"wda/delta_m/{name}"] == pytest.approx(of["delta_m"].mean())
            assert logs[f"wda/delta_d/{name}"] == pytest.approx(of["delta_d"].mean())
    # What the Trainer itself logs, at steps 2 and 4, is there as well.
    lines = trainer.state.log_history
    assert [line["step"] for line in lines if "loss" in line] == [2, 4]
    assert [line["step"] for line in lines if "wda/delta_m/query" in line] == [2, 3]


def test_the_table_is_written_at_the_end(tmp_path: Path) -> None:
    callback = DecompositionCallback(every=3, out=tmp_path / "out", run="mine")
    train(bert(), tmp_path / "ft", callback, save_strategy="no")
    again = wda.read_table(tmp_path / "out")
    pd.testing.assert_frame_equal(again, callback.table, check_exact=True)
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["table.csv", "table.parquet"]
    assert again["step"].unique().tolist() == [3, 5]
    assert set(again["run"]) == {"mine"}
    assert len(wda.compute_statistics(again)) == 3


def test_no_step_measured_is_told(tmp_path: Path) -> None:
    callback = DecompositionCallback([100], out=tmp_path / "out")
    with pytest.warns(UserWarning, match="nothing was measured in 5 steps"):
        train(bert(), tmp_path / "ft", callback, save_strategy="no")
    assert not list((tmp_path / "out").iterdir())


def test_a_second_training_starts_a_new_table(tmp_path: Path) -> None:
    callback = DecompositionCallback([2])
    trainer = train(bert(), tmp_path / "ft", callback, save_strategy="no")
    first = callback.table
    trainer.train()  # goes on from where it ended, which is then W0
    assert len(callback.table) == len(first)
    assert not callback.table.equals(first)


def test_a_resumed_fine_tuning_needs_its_base(tmp_path: Path) -> None:
    model = bert()
    model.save_pretrained(tmp_path / "base")
    train(model, tmp_path / "ft", DecompositionCallback([3, 5]))
    last = str(tmp_path / "ft" / "checkpoint-2")

    def resumed(callback: DecompositionCallback) -> None:
        trainer = transformers.Trainer(
            bert(), arguments(tmp_path / "ft"), train_dataset=texts(), callbacks=[callback]
        )
        trainer.train(resume_from_checkpoint=last)

    with pytest.raises(ModelError, match=r"goes on after step 2, .*; give base= the location"):
        resumed(DecompositionCallback([3, 5]))
    callback = DecompositionCallback([3, 5], base=tmp_path / "base")
    resumed(callback)
    expected = compared(tmp_path / "ft", tmp_path / "base").query("step > 2")
    assert_same_rows(callback.table, expected.reset_index(drop=True))


def test_a_resumed_adapter_is_measured_against_its_frozen_weights(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path / "base")

    def adapted() -> nn.Module:
        config = peft.LoraConfig(r=3, target_modules=["query", "value"], init_lora_weights=True)
        return peft.get_peft_model(bert(), config)

    train(adapted(), tmp_path / "run", DecompositionCallback([3]))
    callback = DecompositionCallback([3, 5])
    trainer = transformers.Trainer(
        adapted(), arguments(tmp_path / "run"), train_dataset=texts(), callbacks=[callback]
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    expected = compared(tmp_path / "run", tmp_path / "base").query("step > 2")
    assert_same_rows(callback.table, expected.reset_index(drop=True))


def test_base_may_name_its_modules_otherwise(tmp_path: Path) -> None:
    """The bare encoder, as it lies on the Hub, under a classifier."""
    model = bert()
    model.bert.save_pretrained(tmp_path / "base")
    callback = DecompositionCallback(STEPS, base=tmp_path / "base")
    train(model, tmp_path / "ft", callback)
    assert_same_rows(callback.table, compared(tmp_path / "ft", tmp_path / "base"))
    assert callback.table["module"][0] == "encoder.layer.0.attention.self.query"


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
@pytest.mark.parametrize("adapted", [False, True])
def test_wrappers_do_not_show_in_names(wrap: Any, adapted: bool) -> None:
    model = bert()
    if adapted:
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"]))
    plain, wrapped = find_weights(model), find_weights(wrap(model))
    assert list(plain) == list(wrapped)
    assert "bert.encoder.layer.0.attention.self.query" in plain
    assert len(plain) == 2 if adapted else len(plain) > 10


def test_other_processes_do_nothing(tmp_path: Path) -> None:
    callback = DecompositionCallback([1], out=tmp_path / "out")
    state = transformers.TrainerState(global_step=1, is_world_process_zero=False)
    control = transformers.TrainerControl()
    args = arguments(tmp_path / "run")
    for event in (callback.on_train_begin, callback.on_step_end, callback.on_train_end):
        event(args, state, control, model=bert())
    assert callback.table.empty
    assert not (tmp_path / "out").exists()


# --- What is refused ----------------------------------------------------------------------------


def begin(model: nn.Module, folder: Path, **options: Any) -> None:
    callback = DecompositionCallback([1], **options)
    state, control = transformers.TrainerState(), transformers.TrainerControl()
    callback.on_train_begin(arguments(folder), state, control, model=model)


@pytest.mark.parametrize(
    "options",
    [{}, {"steps": []}, {"steps": [0, 5]}, {"every": 0}, {"steps": [5], "every": 5}],
)
def test_steps_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"takes the steps to measure after, .*; got steps="):
        DecompositionCallback(**options)


def test_per_is_one_of_two_words() -> None:
    with pytest.raises(ValueError, match='per must be "output" or "input"'):
        DecompositionCallback([1], per="row")  # type: ignore[arg-type]


def test_matrices_and_places_that_do_not_exist_are_told_before_the_training(
    tmp_path: Path,
) -> None:
    with pytest.raises(SelectionError, match="'querry'; labels that exist here: .*query"):
        begin(bert(), tmp_path, matrices="querry")
    with pytest.raises(LocationError, match="nowhere"):
        begin(bert(), tmp_path, base=tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written to"):
        begin(bert(), tmp_path, out=tmp_path / "file" / "out")


def test_a_base_of_other_shapes_is_refused(tmp_path: Path) -> None:
    config = bert().config
    config.hidden_size = 32
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match="has other shapes than the model"):
        begin(bert(), tmp_path, base=tmp_path / "base")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (peft.LoHaConfig(target_modules=["query"]), "only LoRA and DoRA are measured"),
        (
            peft.LoraConfig(target_modules=["query"], init_lora_weights="pissa"),
            "started by 'pissa', which changes the frozen weight",
        ),
        (
            peft.LoraConfig(target_modules=["query"], init_lora_weights="olora"),
            "started by 'olora'",
        ),
    ],
)
def test_other_adapters_are_refused(config: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        begin(peft.get_peft_model(bert(), config), tmp_path)


def test_merged_and_several_adapters_are_refused(tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["query", "value"])
    model = peft.get_peft_model(bert(), config)
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ModelError, match="its adapters 2 at a time; one is measured"):
        begin(model, tmp_path)
    model.base_model.set_adapter("second")
    begin(model, tmp_path)
    model.merge_adapter()
    with pytest.raises(ModelError, match="its adapters are merged"):
        begin(model, tmp_path)


def test_weights_that_are_not_all_there_are_refused(tmp_path: Path) -> None:
    model = bert()
    query = model.bert.encoder.layer[1].attention.self.query
    query.weight = nn.Parameter(query.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"layer.1.attention.self.query: .* quantised"):
        begin(model, tmp_path)
    query.weight = nn.Parameter(torch.zeros(5))  # what FSDP leaves of a split weight
    with pytest.raises(ModelError, match="split over processes"):
        begin(model, tmp_path)
    query.weight = nn.Parameter(torch.zeros(24, 24))
    query.weight.ds_id = 3  # DeepSpeed's mark
    with pytest.raises(ModelError, match="split over processes"):
        begin(model, tmp_path)
    assert issubclass(DTensor, torch.Tensor)


def test_without_transformers_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'transformers' else find(name, *a)\n"
        "import wda\n"
        "try: wda.callbacks\n"
        "except wda.WdaError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    assert done.startswith("callbacks need transformers") and "[train]" in done
