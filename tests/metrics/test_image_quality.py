import hashlib
import math

import pytest
import torch

from imagen_lightning.errors import InputError
from imagen_lightning.metrics.image_quality import LPIPS, psnr, ssim


def pair(num=3, size=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, 256, (num, 3, size, size), generator=generator, dtype=torch.uint8)
    noise = torch.randint(-20, 21, truth.shape, generator=generator)
    return (truth.int() + noise).clamp(0, 255).to(torch.uint8), truth


def test_psnr_is_its_definition():
    images, truth = pair()
    error = (images.double() - truth.double()).square().mean(dim=(1, 2, 3))
    assert torch.allclose(psnr(images, truth), 10 * torch.log10(255**2 / error), rtol=1e-6)  # 255 in float32
    assert psnr(truth, truth).tolist() == [math.inf] * 3
    one_off = truth.clone()
    one_off[:, 0, 0, 0] ^= 1
    assert psnr(one_off, truth).tolist() == pytest.approx([10 * math.log10(255**2 * truth[0].numel())] * 3, rel=1e-6)


def test_ssim_is_its_definition():
    images, truth = pair(2, 12)
    found = ssim(images, truth)
    # Wang et al. 2004 by loops, with the borders reflected
    window = torch.exp(-0.5 * (torch.arange(-5, 6, dtype=torch.float64) / 1.5) ** 2)
    window = torch.outer(window, window) / window.sum() ** 2
    for i in range(2):
        padded = [
            torch.nn.functional.pad(z[i : i + 1].double(), (5, 5, 5, 5), mode="reflect")[0] for z in (images, truth)
        ]
        values = []
        for c in range(3):
            for y in range(12):
                for x in range(12):
                    a, b = (z[c, y : y + 11, x : x + 11] for z in padded)
                    mean_a, mean_b = (window * a).sum(), (window * b).sum()
                    var_a, var_b = (window * a * a).sum() - mean_a**2, (window * b * b).sum() - mean_b**2
                    both = (window * a * b).sum() - mean_a * mean_b
                    c1, c2 = 2.55**2, 7.65**2
                    values.append(
                        (2 * mean_a * mean_b + c1)
                        * (2 * both + c2)
                        / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
                    )
        assert float(found[i]) == pytest.approx(float(torch.stack(values).mean()), rel=1e-9)
    assert ssim(truth, truth).tolist() == pytest.approx([1.0, 1.0], abs=1e-12)


def test_chunks_and_empty_batches_change_nothing(monkeypatch):
    images, truth = pair(5)
    whole = psnr(images, truth), ssim(images, truth)
    monkeypatch.setattr("imagen_lightning.metrics.image_quality._PIXELS", 3000)
    assert torch.equal(psnr(images, truth), whole[0])
    assert torch.allclose(ssim(images, truth), whole[1], rtol=1e-12)
    assert psnr(images[:0], truth[:0]).shape == (0,)


def torchvision_file(tmp_path, monkeypatch, network, seed=0):
    """A random backbone in a file as torchvision publishes it, and its hash expected."""
    import torchvision

    from imagen_lightning.metrics import image_quality
    from imagen_lightning.metrics.features.weights import Published

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        builders = {"alex": "alexnet", "squeeze": "squeezenet1_1"}
        state = getattr(torchvision.models, builders[network])(weights=None).state_dict()
    path = tmp_path / f"{network}.pth"
    torch.save(state, path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    published = Published(image_quality._BACKBONES[network].url, sha256[:8])
    monkeypatch.setitem(image_quality._BACKBONES, network, published)
    return path, sha256, state


@pytest.mark.parametrize("network", [pytest.param("alex", marks=pytest.mark.slow), "squeeze"])
def test_lpips_agrees_with_torchmetrics_on_shared_weights(tmp_path, monkeypatch, network):
    import torchmetrics.functional.image.lpips as theirs

    path, sha256, state = torchvision_file(tmp_path, monkeypatch, network)
    before = torch.get_rng_state()
    lpips = LPIPS(network, path)
    images, truth = pair(3, 64)
    found = lpips(images, truth)
    assert torch.equal(torch.get_rng_state(), before)
    assert lpips.sha256 == sha256
    assert lpips.name == f"lpips-{network}"

    def backbone(net, pretrained=False):
        import torchvision

        model = getattr(torchvision.models, {"alex": "alexnet"}.get(net, net))(weights=None)
        model.load_state_dict(state)
        return model.features

    # torchmetrics' own way, its download replaced by the same weights
    monkeypatch.setattr(theirs, "_get_tv_model_features", backbone)
    as_float = [z.float() / 127.5 - 1 for z in (images, truth)]
    for i in range(3):
        expected = theirs.learned_perceptual_image_patch_similarity(
            as_float[0][i : i + 1], as_float[1][i : i + 1], net_type=network
        )
        assert float(found[i]) == pytest.approx(float(expected), rel=1e-5)
    assert lpips(truth, truth).tolist() == [0.0] * 3
    assert lpips(truth[:0], truth[:0]).shape == (0,)


def test_lpips_says_what_weights_it_needs(tmp_path, monkeypatch):
    images, truth = pair(1, 64)
    with pytest.raises(
        InputError, match=r"there is no file '.*absent\.pth'; give alexnet-owt-7be5be79\.pth from https"
    ):
        LPIPS("alex", tmp_path / "absent.pth")(images, truth)
    (tmp_path / "other.pth").write_bytes(b"other")
    with pytest.raises(InputError, match=r"has SHA-256 d9298a10d1b0.*, not 7be5be79; give the right file"):
        LPIPS("alex", tmp_path / "other.pth")(images, truth)
    path, *_ = torchvision_file(tmp_path, monkeypatch, "squeeze")
    with pytest.raises(InputError, match="at least 32 px"):
        LPIPS("squeeze", path)(images[..., :16, :16], truth[..., :16, :16])
    with pytest.raises(InputError, match="'resnet' is unknown; use one of alex, vgg, squeeze"):
        LPIPS("resnet")


def test_what_cannot_be_measured():
    images, truth = pair()
    for call, message in [
        (lambda: psnr(images.float(), truth), r"PSNR needs uint8 images \(B, 3, H, W\), not torch.float32"),
        (lambda: psnr(images[:, :1], truth[:, :1]), "needs uint8 images"),
        (lambda: ssim(images, truth[:2]), r"one shape, not \(3, 3, 24, 24\) and \(2, 3, 24, 24\)"),
        (lambda: ssim(images[..., :5, :5], truth[..., :5, :5]), r"SSIM needs images of at least 6 px, not \(5, 5\)"),
    ]:
        with pytest.raises(InputError, match=message):
            call()
