"""The training loop: rates, records, and what it refuses."""

import pytest
import torch
from karmma.data.errors import RunError
from karmma.data.runs import RunFolder
from karmma.fuse.config import TeacherConfig, TrainingConfig
from karmma.fuse.loop import Onlooker, Waiting, fit
from karmma.fuse.schedule import learning_rate
from karmma.fuse.training import begin, prepare, score


class Line:
    """y = 2 x, in four batches an epoch."""

    steps_per_epoch = 4

    def __init__(self, model, poison_at=None):
        self.model, self.seen, self.poison_at = model, 0, poison_at

    def batches(self, epoch, first):
        for step in range(first, self.steps_per_epoch):
            yield type("Batch", (), {"rows": [0, 1], "x": torch.tensor([[1.0 + step], [-2.0]])})

    def learn(self, batch, step):
        self.seen += 1
        mse = ((self.model(batch.x) - 2 * batch.x) ** 2).mean()
        loss = mse * (float("nan") if self.seen == self.poison_at else 1)
        loss.backward()
        return {"loss": loss, "mse": mse}

    def about(self, epoch):
        return {"told": epoch * 10}

    def validate(self, models):
        losses = [(model.weight - 2).abs().item() for model in models]
        return [{"action": 1.0 if loss < 0.5 else 0.0, "loss": loss} for loss in losses]


CONFIG = TeacherConfig(epochs=30, warmup_epochs=3, max_lr=0.3, min_lr=1e-3, weight_decay=0.0)


def trained(tmp_path, **poison):
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1, bias=False)
    run = RunFolder(tmp_path / "run")
    training = begin(model, Line(model, **poison), CONFIG, run, {})
    fit([training])
    return training.finish(), model, run


def test_loop_reaches_the_minimum_and_keeps_the_best_epoch(tmp_path):
    best, model, run = trained(tmp_path)
    assert abs(model.weight.item() - 2) < 0.05
    records = run.metrics()
    assert best["epoch"] == max(records, key=lambda record: score(record["val"]))["epoch"]
    assert abs(run.load_checkpoint("best")["weight"].item() - 2) == pytest.approx(best["val"]["loss"])
    assert run.load_checkpoint("last")["weight"].item() == model.weight.item()


def test_record_holds_the_rate_of_the_last_step_and_the_mean_of_every_loss_part(tmp_path):
    _, _, run = trained(tmp_path)
    for record in run.metrics():
        step = record["epoch"] * 4 + 3
        settings = {"max_lr": 0.3, "min_lr": 1e-3, "warmup_epochs": 3, "epochs": 30}
        assert record["lr"] == pytest.approx(learning_rate(step, 4, **settings))
        assert record["loss"] == pytest.approx(record["mse"])
        assert record["told"] == record["epoch"] * 10
        assert record["clips_per_s"] > 0


def test_loss_that_is_not_finite_stops_the_run_with_the_step(tmp_path):
    with pytest.raises(RunError, match=r"Epoch 1, step 2: the loss is nan\. Lower max_lr \(now 0\.3\)"):
        trained(tmp_path, poison_at=7)
    assert not RunFolder(tmp_path / "run").is_finished


def test_loss_on_validation_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(Line, "validate", lambda self, models: [{"action": 0.5, "loss": float("inf")}])
    with pytest.raises(RunError, match=r"Epoch 0: the loss on validation is inf\. Lower max_lr \(now 0\.3\)"):
        trained(tmp_path)
    assert RunFolder(tmp_path / "run").metrics() == []


def test_run_that_another_has_taken_over_is_not_written_to(tmp_path):
    class Lost(Onlooker):
        def owns(self, training):
            return training.position.epoch < 2

    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1, bias=False)
    config = CONFIG.model_copy(update={"save_minutes": 0.0})
    training = begin(model, Line(model), config, RunFolder(tmp_path / "run"), {})
    fit([training], Lost())
    assert [record["epoch"] for record in training.run.metrics()] == [0, 1]
    fresh = torch.nn.Linear(1, 1, bias=False)
    again = begin(fresh, Line(fresh), config.model_copy(update={"resume": True}), training.run, {})
    assert (again.position.epoch, again.position.at) == (2, 0)


def test_several_on_the_same_batches_read_each_once_and_end_as_they_would_apart(tmp_path):
    """One of them diverges in its second epoch, one is ended after its first; the others do not notice."""
    ended = []

    class Ending(Onlooker):
        def goes_on(self, training, record):
            return not (training.run.path.name == "c" and record["epoch"] == 0)

        def failed(self, training, error):
            ended.append((training.run.path.name, str(error)))

    lone, read = {}, []
    for together in (False, True):
        trainings = {}
        for name, rate in (("a", 0.3), ("b", 0.3), ("c", 0.1), ("d", 0.05)):
            torch.manual_seed(0)
            model = torch.nn.Linear(1, 1, bias=False)
            course = Line(model, poison_at=7 if name == "b" else None)
            course.batches = lambda epoch, first, real=course.batches: (read.append(b) or b for b in real(epoch, first))
            config = CONFIG.model_copy(update={"max_lr": rate})
            trainings[name] = begin(model, course, config, RunFolder(tmp_path / str(together) / name), {})
        if together:
            n_alone = len(read)
            fit(list(trainings.values()), Ending())
            assert n_alone == 4 * 30 + 7 + 4 + 4 * 30
            assert len(read) - n_alone == 4 * 30
        else:
            for training in trainings.values():
                fit([training], Ending())
        found = {name: (t.model.weight.item(), t.position.epoch) for name, t in trainings.items()}
        lone = lone or found
    assert found == lone
    assert [epoch for _, epoch in found.values()] == [30, 1, 1, 30]
    assert [name for name, _ in ended] == ["b", "b"]


def test_best_is_the_higher_action_accuracy_then_the_lower_loss():
    assert score({"action": 0.5, "loss": 2.0}) > score({"action": 0.4, "loss": 0.1})
    assert score({"action": 0.5, "loss": 1.0}) > score({"action": 0.5, "loss": 2.0})
    assert score({"action": None, "loss": 1.0}) > score({"action": None, "loss": 2.0})


def test_waiting_counts_only_the_time_before_a_batch(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("karmma.fuse.loop.time.perf_counter", lambda: clock[0])

    def slow():
        for _ in range(3):
            clock[0] += 2
            yield 1

    waiting = Waiting()
    for _ in waiting.over(slow()):
        clock[0] += 5
    assert waiting.seconds == 6


@pytest.mark.parametrize("is_capable", [True, False])
def test_bfloat16_is_warned_of_where_the_hardware_does_not_have_it(monkeypatch, caplog, is_capable):
    monkeypatch.setattr("karmma.fuse.training.has_bfloat16", lambda device: is_capable)
    prepare(TrainingConfig(device="cpu", precision="bfloat16"))
    assert ("This cpu computes bfloat16 by way of float32" in caplog.text) is not is_capable
    caplog.clear()
    prepare(TrainingConfig(device="cpu"))
    assert not caplog.text
