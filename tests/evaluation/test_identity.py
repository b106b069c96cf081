"""Which cascade a folder holds, its weights in one file a stage or several."""

import hashlib
import json

from imagen_lightning.cascade import Cascade
from imagen_lightning.diffusion import NoThresholding
from imagen_lightning.evaluation.identity import images_sha256, weights_sha256
from imagen_lightning.networks import UNet
from imagen_lightning.stages import BaseStage


def stage():
    return BaseStage(8, UNet(8, (1,), 1, (False,), groups=4))


def test_weights_in_one_file_are_named_as_before_there_could_be_several(tmp_path):
    Cascade([stage()]).save(tmp_path / "one")
    entry = json.loads((tmp_path / "one" / "cascade.json").read_text())["stages"][0]
    wanted = json.dumps([("base", entry["weights"]["sha256"])], sort_keys=True)
    assert weights_sha256(tmp_path / "one") == hashlib.sha256(wanted.encode()).hexdigest()


def test_weights_in_several_files_are_named_by_all_of_them(tmp_path):
    made = Cascade([stage()])
    made.save(tmp_path / "several", max_shard_size=5000)
    made.save(tmp_path / "again", max_shard_size=5000)
    before = weights_sha256(tmp_path / "several"), images_sha256(tmp_path / "several", ())
    assert before == (weights_sha256(tmp_path / "again"), images_sha256(tmp_path / "again", ()))
    made.stages[0].network.conv_out.bias.data += 1
    made.save(tmp_path / "other", max_shard_size=5000)
    changed = weights_sha256(tmp_path / "other"), images_sha256(tmp_path / "other", ())
    assert not set(before) & set(changed)


def test_a_rewritten_manifest_of_equal_settings_makes_the_same_images(tmp_path):
    made = Cascade([stage()])
    made.save(tmp_path / "cascade")
    before = images_sha256(tmp_path / "cascade", ())
    made.metrics.append({"metric": "FID"})
    made.stages[0].sampling.guidance = 3  # 3.0 before
    made.stages[0].weights_record = {"kind": "ema"}
    made.save_manifest(tmp_path / "cascade")
    assert images_sha256(tmp_path / "cascade", ()) == before
    made.stages[0].sampling.thresholding = NoThresholding()
    made.save_manifest(tmp_path / "cascade")
    assert images_sha256(tmp_path / "cascade", ()) != before
    assert images_sha256(tmp_path / "cascade", (), guidance=2.0) != images_sha256(tmp_path / "cascade", ())
