"""The teacher's stage on made-up tokens: trained where there is no video and no backbone."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from karmma.data.clips import read_clip_table
from karmma.data.errors import CacheError, IncompleteCacheError, StaleCacheError, TableError
from karmma.data.modality import FAILED
from karmma.data.runs import RunFolder
from karmma.data.stores import LogitStore, TokenStore
from karmma.data.theta import theta_average
from karmma.fuse.config import TeacherConfig
from karmma.fuse.model import build_fusion
from karmma.fuse.stage import train_teacher
from karmma.fuse.training import usable_rows

TINY = TeacherConfig(
    embed_dim=16, ffn_dim=16, n_layers=1, n_attention_heads=2, attention_dropout=0.0, epochs=15, warmup_epochs=2,
    batch_size=4, max_lr=1e-2, threads=1,
)  # fmt: skip


def test_teacher_learns_what_the_tokens_show(made):
    report = train_teacher(made.table, made.data, TINY)
    assert report.modalities == ("video", "audio")
    assert report.result["val"]["action"] == 1.0
    metrics = RunFolder.open(report.run).metrics()
    assert len(metrics) == 15
    assert metrics[-1]["loss"] < metrics[0]["loss"] / 2
    assert all(0 <= record["waiting_share"] <= 1 for record in metrics)


def test_logits_are_those_of_the_best_weights_on_the_cached_tokens(made):
    report = train_teacher(made.table, made.data, TINY)
    model = build_fusion({"video": 4, "audio": 4}, {"video": 3, "audio": 3}, {"verb": 2, "noun": 3}, TINY).eval()
    model.load_state_dict(RunFolder.open(report.run).load_checkpoint("best"))
    names = RunFolder.open(report.run).config["tokens"]
    tokens = {}
    for modality, name in names.items():
        stored = TokenStore.open(made.cache.tokens_path(modality, name)).read(np.arange(24), 0)
        tokens[modality] = torch.from_numpy(stored).float()
    present = ~torch.stack([tokens[m].isnan().any(-1).any(-1) for m in ("video", "audio")], 1)
    assert present.tolist()[2] == [True, False]
    with torch.inference_mode():
        expected = model(tokens, present).logits
    store = LogitStore.open(report.logits)
    found = store.read(np.arange(24), 0)
    for head in ("verb", "noun"):
        assert np.allclose(found[head], expected[head].numpy(), atol=1e-5)
    assert store.attributes["teacher"] == report.result["teacher"] == report.logits.stem


def test_same_call_again_does_nothing_and_other_settings_make_another_run(made):
    first = train_teacher(made.table, made.data, TINY)
    again = train_teacher(made.table, made.data, TINY)
    other = train_teacher(made.table, made.data, TINY.model_copy(update={"seed": 1}))
    assert (first.was_there, again.was_there, other.was_there) == (False, True, False)
    assert again.run == first.run != other.run


def test_same_seed_gives_the_same_weights_bit_by_bit(made, tmp_path):
    first = train_teacher(made.table, made.data, TINY)
    elsewhere = made.data.model_copy(update={"runs": tmp_path / "elsewhere"})
    second = train_teacher(made.table, elsewhere, TINY)
    assert not second.was_there
    assert first.result["teacher"] == second.result["teacher"]


def test_modality_that_is_not_complete_is_left_out_and_said(made):
    data = made.data.model_copy(update={"modalities": ("video", "flow", "audio")})
    report = train_teacher(made.table, data, TINY)
    assert report.modalities == ("video", "audio")
    assert report.left_out == {"flow": "24 of 24 clips are not extracted as the table has them"}


def test_two_complete_sets_of_tokens_are_listed_and_one_can_be_chosen(made):
    name = made.add("video", 0, theta=2)
    with pytest.raises(CacheError, match=r"2 complete sets of video tokens fit: .*theta is .*teacher\.tokens\.video="):
        train_teacher(made.table, made.data, TINY)
    report = train_teacher(made.table, made.data, TINY.model_copy(update={"tokens": {"video": name}}))
    assert RunFolder.open(report.run).config["tokens"]["video"] == name


def test_tokens_of_other_inputs_are_refused_with_the_field(made):
    data = made.data.model_copy(update={"frames": 16})
    with pytest.raises(StaleCacheError, match=r"video .* under other settings: input\.frames is 32, asked for 16"):
        train_teacher(made.table, data, TINY)


def test_failed_clips_block_unless_they_are_allowed(made):
    name = made.add("audio", 1, theta=2, states={5: FAILED})
    config = TINY.model_copy(update={"tokens": {"audio": name}})
    with pytest.raises(IncompleteCacheError, match=r"audio of 1 clip\(s\) failed.*c5: broken.*--allow-failures 1"):
        train_teacher(made.table, made.data, config)
    assert train_teacher(made.table, made.data, config.model_copy(update={"allow_failures": 1})).result["val"]


def test_clips_that_the_cache_has_never_seen_are_named(made, tmp_path):
    text = (tmp_path / "clips.csv").read_text() + "new,v.mp4,train,a,x\n"
    (tmp_path / "more.csv").write_text(text)
    with pytest.raises(IncompleteCacheError, match=r"1 clip\(s\) of the table are not in the cache, such as 'new'"):
        train_teacher(read_clip_table(tmp_path / "more.csv", made.data.heads), made.data, TINY)


def test_table_without_labelled_validation_clips_is_refused(made, tmp_path):
    (tmp_path / "t.csv").write_text((tmp_path / "clips.csv").read_text().replace(",val,", ",train,"))
    with pytest.raises(TableError, match="no clip of split 'val' has a label in column 'verb'"):
        train_teacher(read_clip_table(tmp_path / "t.csv", made.data.heads), made.data, TINY)


def test_head_with_one_class_is_refused(made, tmp_path):
    (tmp_path / "t.csv").write_text((tmp_path / "clips.csv").read_text().replace(",b,", ",a,"))
    with pytest.raises(TableError, match=r"column 'verb' has 1 class\(es\), expected two or more"):
        train_teacher(read_clip_table(tmp_path / "t.csv", made.data.heads), made.data, TINY)


def test_every_strategy_for_missing_modalities_trains(made):
    for missing in ("B.1", "B.2", "B.3", "B.4", "B.5"):
        config = TINY.model_copy(update={"missing": missing, "epochs": 2, "warmup_epochs": 1})
        assert np.isfinite(train_teacher(made.table, made.data, config).result["val"]["loss"])


def test_teacher_trains_without_video_libraries_and_backbones(made):
    code = (
        "import sys\n"
        "for name in ('av', 'cv2', 'timm', 'torchvision'): sys.modules[name] = None\n"
        "import karmma.fuse.teacher, karmma.fuse.stage\n"
        "assert not [name for name in sys.modules if name.startswith('karmma.extract')]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_clip_whose_source_changed_is_not_trained_on_with_its_old_tokens(made, tmp_path):
    (tmp_path / "t.csv").write_text((tmp_path / "clips.csv").read_text().replace("c3,v.mp4", "c3,other.mp4"))
    with pytest.raises(IncompleteCacheError, match="video: 1 of 24 clips are not extracted as the table has them"):
        train_teacher(read_clip_table(tmp_path / "t.csv", made.data.heads), made.data, TINY)


def test_shard_whose_receipt_is_gone_does_not_exist(made):
    (name,) = made.cache.identities("audio")
    made.cache.drop_receipt("audio", name, 0, 0)
    with pytest.raises(
        IncompleteCacheError, match=r"audio: 24 of 24 clips are not extracted as the table has them\. Run"
    ):
        train_teacher(made.table, made.data, TINY)


def test_table_without_training_clips_is_refused(made, tmp_path):
    (tmp_path / "t.csv").write_text((tmp_path / "clips.csv").read_text().replace(",train,", ",val,"))
    with pytest.raises(TableError, match="no clip of split 'train' has a label"):
        train_teacher(read_clip_table(tmp_path / "t.csv", made.data.heads), made.data, TINY)


def test_lost_logits_are_written_again_without_training(made):
    first = train_teacher(made.table, made.data, TINY)
    before = LogitStore.open(first.logits).read(np.arange(24), 0)
    weights = (first.run / "best.safetensors").stat().st_mtime_ns
    shutil.rmtree(first.logits)
    second = train_teacher(made.table, made.data, TINY)
    after = LogitStore.open(second.logits).read(np.arange(24), 0)
    assert second.run == first.run
    assert (second.run / "best.safetensors").stat().st_mtime_ns == weights
    assert all(np.array_equal(before[head], after[head]) for head in before)


def test_validation_without_a_clip_labelled_in_every_head_trains_to_the_end(made, tmp_path):
    lines = (tmp_path / "clips.csv").read_text().splitlines()
    for at in range(1, 25):
        cells = lines[at].split(",")
        if cells[2] == "val":
            cells[3 + at % 2] = ""
        lines[at] = ",".join(cells)
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    report = train_teacher(read_clip_table(tmp_path / "t.csv", made.data.heads), made.data, TINY)
    assert report.result["val"]["action"] is None
    assert report.result["val"]["verb"] == 1.0


def test_unlabelled_clips_get_logits_and_are_never_trained_on(made, tmp_path):
    lines = (tmp_path / "clips.csv").read_text().splitlines()
    for at, line in enumerate(lines[1:], 1):
        if line.startswith("c3,") or ",test," in line:
            lines[at] = ",".join([*line.split(",")[:3], "", ""])
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    table = read_clip_table(tmp_path / "t.csv", made.data.heads)
    unlabelled = [3, *range(20, 24)]
    assert np.flatnonzero(table.labels("verb") < 0).tolist() == unlabelled
    report = train_teacher(table, made.data, TINY)
    logits = LogitStore.open(report.logits).read(np.array(unlabelled), 0)
    assert all(np.isfinite(values).all() for values in logits.values())
    rows = usable_rows(table, made.data.heads, np.ones((24, 2), bool))
    assert 3 not in rows["train"]
    assert len(rows["train"]) == 15


def test_teacher_trains_in_bfloat16_to_much_the_same(made):
    exact = train_teacher(made.table, made.data, TINY)
    rough = train_teacher(made.table, made.data, TINY.model_copy(update={"precision": "bfloat16"}))
    assert rough.run != exact.run
    assert rough.result["val"]["action"] == 1.0
    first = [RunFolder.open(report.run).metrics()[0]["loss"] for report in (exact, rough)]
    assert first[0] != first[1]
    assert first[1] == pytest.approx(first[0], rel=0.02)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch looks itself, and hides it
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_teacher_trains_compiled_to_the_same_losses(made):
    eager = train_teacher(made.table, made.data, TINY)
    compiled = train_teacher(made.table, made.data, TINY.model_copy(update={"compile": True}))
    assert compiled.run != eager.run
    losses = [[record["loss"] for record in RunFolder.open(report.run).metrics()] for report in (eager, compiled)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_symmetric_info_nce_is_an_option_that_changes_the_loss(made):
    one, both = (
        train_teacher(made.table, made.data, TINY.model_copy(update={"symmetric": symmetric, "epochs": 1}))
        for symmetric in (False, True)
    )
    first = [RunFolder.open(report.run).metrics()[0] for report in (one, both)]
    assert first[0]["info_nce"] != first[1]["info_nce"]


def test_theta_averages_tokens_of_a_cache_that_holds_all_of_them(made):
    """Train on 3 tokens averaged to 2, and on a cache that holds these 2: the same teacher."""
    whole = made.add("video", 0, theta=None)
    chosen = TINY.model_copy(update={"tokens": {"video": whole}, "theta": 2})
    data = made.data.model_copy(update={"modalities": ("video",)})
    report = train_teacher(made.table, data, chosen)
    stored = TokenStore.open(made.cache.tokens_path("video", whole)).read(np.arange(24), 0)
    model = build_fusion({"video": 4}, {"video": 2}, {"verb": 2, "noun": 3}, TINY).eval()
    model.load_state_dict(RunFolder.open(report.run).load_checkpoint("best"))
    tokens = theta_average(torch.from_numpy(stored).float(), 2)
    with torch.inference_mode():
        expected = model({"video": tokens}, torch.ones(24, 1, dtype=torch.bool)).logits
    found = LogitStore.open(report.logits).read(np.arange(24), 0)
    for head in ("verb", "noun"):
        assert np.allclose(found[head], expected[head].numpy(), atol=1e-5)


def test_averages_of_averages_are_refused_with_the_reason(made):
    with pytest.raises(StaleCacheError, match=r"with theta 3, this run asks for theta 2: averages of averages"):
        train_teacher(made.table, made.data, TINY.model_copy(update={"theta": 2}))
    same = train_teacher(made.table, made.data, TINY.model_copy(update={"theta": 3, "epochs": 1}))
    assert same.modalities == ("video", "audio")
