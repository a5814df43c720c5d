"""The callback's state in checkpoints, and in a second fit."""

import pytest

import torch_sap

L = pytest.importorskip("lightning.pytorch")

from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.strategies import SingleDeviceStrategy  # noqa: E402
from lightning_modules import (  # noqa: E402
    BATCHES,
    EPOCHS,
    IGNORED,
    LR,
    LateModule,
    Module,
    Resumable,
    Starts,
    assert_rewound,
    assert_same,
    fit,
    history_of,
    loader,
    trainer,
)

from torch_sap.integrations.lightning import SAPCallback  # noqa: E402

pytestmark = IGNORED


class TestResume:
    @pytest.mark.parametrize(
        ("validation", "settings"), [(True, {}), (False, {}), (True, {"save_on_train_epoch_end": True})]
    )
    def test_from_every_epoch(self, tmp_path, validation, settings):
        saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, **settings)
        callback = SAPCallback(EPOCHS)
        module = fit(3 * EPOCHS, callback, saver, validation=validation)
        paths = sorted(tmp_path.glob("*.ckpt"))
        assert len(paths) == 3 * EPOCHS
        for path in paths:
            again = SAPCallback(EPOCHS)
            assert_same(fit(3 * EPOCHS, again, validation=validation, ckpt_path=path), module)
            assert history_of(again) == history_of(callback), path

    def test_from_the_middle_of_an_epoch(self, tmp_path):
        saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
        callback = SAPCallback(EPOCHS)
        module = fit(2 * EPOCHS, callback, saver, train=Resumable())
        for epoch in range(2 * EPOCHS):
            again = SAPCallback(EPOCHS)
            path = tmp_path / f"step={BATCHES * epoch + 2}.ckpt"
            assert_same(fit(2 * EPOCHS, again, train=Resumable(), ckpt_path=path), module)
            assert [each.remaining for each in again.history] == [each.remaining for each in callback.history]

    @pytest.mark.parametrize("late", ["module", "strategy"])
    def test_of_what_is_made_or_loaded_late(self, tmp_path, late):
        class Late(SingleDeviceStrategy):
            restore_checkpoint_after_setup = True

        kind = LateModule if late == "module" else Module
        settings = {"strategy": Late(device="cpu")} if late == "strategy" else {}
        saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        callback, again = SAPCallback(EPOCHS), SAPCallback(EPOCHS)
        module = fit(2 * EPOCHS, callback, saver, module=kind())
        path = tmp_path / f"epoch={EPOCHS}.ckpt"
        assert_same(fit(2 * EPOCHS, again, module=kind(), ckpt_path=path, **settings), module)
        assert history_of(again) == history_of(callback)

    def test_with_the_rewind_point_of_late_rewinding(self, tmp_path):
        saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        module = fit(3 * EPOCHS, SAPCallback(EPOCHS, rewind=1), saver)
        for epoch in (0, 1, EPOCHS + 1):
            again = fit(3 * EPOCHS, SAPCallback(EPOCHS, rewind=1), ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
            assert_same(again, module)

    def test_from_a_checkpoint_written_after_a_fit(self, tmp_path):
        callback, again = SAPCallback(EPOCHS), SAPCallback(EPOCHS)
        first = trainer(EPOCHS - 1, SAPCallback(EPOCHS))
        first.fit(Module(), loader(), loader())
        first.save_checkpoint(tmp_path / "after.ckpt")
        module = fit(2 * EPOCHS, again, ckpt_path=tmp_path / "after.ckpt")
        assert_same(module, fit(2 * EPOCHS, callback))
        assert history_of(again) == history_of(callback)

    def test_with_other_settings_is_refused(self, tmp_path):
        fit(1, SAPCallback(EPOCHS), ModelCheckpoint(tmp_path, filename="one"))
        with pytest.raises(ValueError, match="scope: 'global' here, 'layer' in the state"):
            fit(2, SAPCallback(EPOCHS, scope="global"), ckpt_path=tmp_path / "one.ckpt")

    def test_a_dense_checkpoint_is_a_start(self, tmp_path):
        fit(1, ModelCheckpoint(tmp_path, filename="dense"))
        starts, callback = Starts(), SAPCallback(EPOCHS)
        fit(1 + 2 * EPOCHS, callback, starts, ckpt_path=tmp_path / "dense.ckpt")
        assert_rewound(starts.states[EPOCHS], starts.states[0])
        assert [each.number for each in callback.history] == [0, 1]

    def test_a_dense_checkpoint_does_not_take_masks_away(self, tmp_path):
        fit(1, ModelCheckpoint(tmp_path, filename="dense"))
        module = Module()
        report = torch_sap.global_unstructured(module)
        refused = pytest.raises(RuntimeError, match="weight_mask")
        with refused, pytest.warns(UserWarning, match="plain weights that are not zero where the model is pruned"):
            fit(2, SAPCallback(EPOCHS), module=module, ckpt_path=tmp_path / "dense.ckpt")
        assert sum(int(module.network[number].weight_mask.sum()) for number in (0, 3)) == report.remaining < 216


class TestSecondFit:
    @pytest.mark.parametrize("same_trainer", [True, False])
    def test_it_continues(self, same_trainer):
        expected, callback, module = SAPCallback(EPOCHS), SAPCallback(EPOCHS), Module()
        whole = fit(3 * EPOCHS, expected)
        first = trainer(EPOCHS, callback)
        first.fit(module, loader(), loader())
        assert len(callback.history) == 1
        second = first if same_trainer else trainer(2 * EPOCHS, callback)
        second.fit_loop.max_epochs = 3 * EPOCHS if same_trainer else 2 * EPOCHS
        second.fit(module, loader(), loader())
        assert_same(module, whole)
        assert history_of(callback) == history_of(expected)

    def test_a_round_may_go_over_two_fits(self):
        callback, starts = SAPCallback(EPOCHS), Starts()
        module = fit(EPOCHS - 1, callback, starts)
        fit(EPOCHS, callback, starts, module=module)
        assert [each.density < 1 for each in callback.history] == [False, True]
        assert_rewound(starts.states[EPOCHS], starts.states[0])

    def test_after_an_interruption(self):
        class Fail(L.Callback):
            def on_train_batch_end(self, trainer, *_):
                if trainer.current_epoch == EPOCHS + 1:
                    raise RuntimeError("power cut")

        callback, starts, module = SAPCallback(EPOCHS), Starts(), Module()
        with pytest.raises(RuntimeError, match="power cut"):
            fit(2 * EPOCHS, callback, Fail(), module=module)
        fit(EPOCHS, callback, starts, module=module)  # two epochs complete the round, one begins the next
        assert [each.number for each in callback.history] == [0, 1, 2]
        assert starts.lrs[2] == LR

    def test_another_module_starts_again(self):
        callback, alone = SAPCallback(EPOCHS), SAPCallback(EPOCHS)
        fit(2 * EPOCHS - 1, callback)
        module = fit(2 * EPOCHS, callback)
        assert_same(module, fit(2 * EPOCHS, alone))
        assert history_of(callback) == history_of(alone)
