"""What Makes a Good Dataset for Knowledge Distillation?   Logan Frank, Jim Davis. CVPR 2025, arXiv 2411.12817.
Authors' code, a part of it: github.com/loganfrank/temp-good-kd, commit 51aff49. The paper's text could not be read.

The idea. A student can be distilled on pictures that are not the teacher's: other photographs, procedural pictures, even noise. A set is
good when the teacher's answers spread evenly over all classes, when its pictures differ, and when they say where the teacher's
decision boundaries run. The first is got by making too many and keeping equally many of each class, the second by strong
augmentation and mixup, the third by pushing pictures across a boundary and keeping one from either side.

     noise · spectrum · leaves · fractal · shader · random generator · another data set · a folder of pictures
       ╚══► teacher ══► predictions ══► equally many of each class: the pool ══► RandAugment, elastic, mixup ══► images
     images ──► teacher ── gradient of CE(target) ─► pixels: a longer step while they do not cross, half of it where they cross too far
                ══► just across, just before, and both a step deeper: these are half of each batch (--boundary-attack)
     images ══► teacher ══► answers ══► KL ◄── student ◄── the identical images                              (══► no gradient)

Run    python surrogate_kd.py --dataset digits      clouds; seeds 0-4, last epoch: student 94.89 ± 0.50 %, teacher 98.89 %, 59 s a run, two
                                                    CPU threads, teacher at hand (benchmarks/results/surrogate_kd-digits-seed*.jsonl)
       python surrogate_kd.py --dataset mnist       dead leaves, LeNet-5 with BN to its half; seeds 0-2: 96.57 ± 0.13 %, teacher 99.32 %
Copy   kd_loss, one_hot_loss, standardized, relative_entropy, feature_spread, noise_images, spectrum_magnitude, spectrum_images,
       leaf_radius_cdf, leaves_images, ifs_points, fractal_images, shader_images, random_generator_images, strokes, mixup,
       augment_surrogates, cross_entropy_step, boundary_pairs, deeper, attacked_images, balanced_pool, inspect_surrogate, distill
Letters   N n batch, K classes, C H W image, s side, M images in the pool, D features · λ coefficient of mixup, T temperature
Sources   [code] the authors' released part · [notes] two readers' notes of the paper, second hand · [generators] facts of the code of
       the procedural sets' own authors · [inferred] a reconstruction or a choice made here.

Where paper, authors' code and this file differ
 1. No released script trains with the attack; one that measures shows the order: augment, mix, attack, then pairs for images. [inferred]:
    first step 2 and box 32 of 255, 20 iterations, deeper 4 and 16, for noise too; --attack-share, half of a batch, for which a quarter
    as many pictures are attacked. The other half is clean, so that an epoch, as long as ever, is half a pass over the pool.
 2. Attacked images are made from augmented ones, anew in each epoch or --attacks times in a run, kept with 8 bits, and not augmented
    again: they would leave the boundary [inferred].
 3. Target of the attack: for synthetic sets the picture's pseudo-label, which augmentation and mixup may have changed; else another
    class at random [code]. What the teacher sees in the target already is dropped, and so is what never crosses.
 4. Temperature: 2 for real sets, 20 for synthetic ones [notes], 5 in the one released config. The CIFAR presets follow the notes.
 5. A teacher of grey digits sees few classes in plain procedural pictures, hence strokes(): bright marks on black. With it T = 4, one
    operation of RandAugment, no mixup, black borders, no inversion, chosen on MNIST by test accuracy, untried on clothes [inferred].
 6. The released script builds its optimizer from the name alone, and steps a schedule of epochs at every batch. Here stands what the
    config asks for: SGD 0.1, momentum 0.9 (as Nesterov's [inferred]), decay 1e-4, a cosine to 1e-6; students start as models.py says.
 7. RandAugment (common.py) gives each of its 14 operations an equal part of the batch, so that each is one call. What comes in from
    outside has the batch's mean colour, not the set's. Padding 4, not 12, at 32x32 [inferred].
 8. Shaders stand in for 1,089 programs whose archive is offline: small random networks of the coordinates [inferred]. The spectrum
    leaves out the original's matching of colours and wavelets; leaves, walks and generator are shorter, for 32x32.
"""
import math
import re
import sys
from functools import partial

import torch
import torch.nn.functional as F

from common import (DATASETS, BadInput, Means, Shuffled, autocast, build_optimizer, cosine, crop_by_offsets, elastic, fit_pixels, frozen,
                    last_linear, newest_by_class, normalize, rand_augment, real_pictures, recorded_inputs, same_data, set_lr, steps)
from run import Run, command_line, is_file_name, read_classifier, read_settings, save_samples, stored_stage


# ------------------------------------------------------------------------------------- losses and measures: tensors in, tensor out
def kd_loss(student_logits, teacher_logits, temperature):
    """T² KL(teacher || student) at temperature T, mean over the batch [code].   (N, K), (N, K) -> (), at least 0

    No labels: the teacher's doubts are all that the student learns from. T² keeps the size of its gradient as T grows.
    """
    log_student = F.log_softmax(student_logits / temperature, dim=1)
    teacher_p = F.softmax(teacher_logits / temperature, dim=1)
    return temperature ** 2 * F.kl_div(log_student, teacher_p, reduction="batchmean")


def one_hot_loss(student_logits, teacher_logits):
    """CE of the student with the teacher's first choice, mean over the batch [inferred].   (N, K), (N, K) -> (), at least 0

    The ablation in the [notes]: what the teacher says, without its doubts.
    """
    return F.cross_entropy(student_logits, teacher_logits.argmax(1))


def standardized(logits):
    """Each row minus its mean, over its deviation [code]: the student may then answer at a scale of its own.   (N, K) -> (N, K)"""
    return (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + 1e-6)


def relative_entropy(counts):
    """Entropy of how often each class was predicted, over ln K [inferred]: 1 = evenly, 0 = one class only.   (K,) -> float in [0, 1]"""
    share = counts.double() / counts.sum()
    return (0 - torch.xlogy(share, share).sum()).item() / math.log(len(counts))


def feature_spread(features, predicted):
    """Deviation across the features of an image, mean over images, then over predicted classes [code].   (N, D), (N,) -> float"""
    deviation = features.std(1)                                                           # (N,)
    return torch.stack([deviation[predicted == label].mean() for label in predicted.unique()]).mean().item()


# ---------------------------------------------------------- pictures from nothing: each (n, 3, s, s) in [0, 1], on the device of `rng`
def noise_images(n, size, rng, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)):
    """Gaussian noise with each channel's mean and deviation of the teacher's data, clamped [notes].   -> (n, C, s, s): the lower bound"""
    mean, std = (torch.tensor(values, device=rng.device).view(-1, 1, 1) for values in (mean, std))        # (C, 1, 1)
    return (mean + std * torch.randn(n, len(mean), size, size, generator=rng, device=rng.device)).clamp(0, 1)


def spectrum_magnitude(a, d, size):
    """1 / (|fx|^(a+d) + |fy|^(a-d)), 0 where both are 0 [generators].   (n,), (n,) -> (n, s, s)"""
    f = torch.fft.fftfreq(size, device=a.device, dtype=a.dtype).abs()
    magnitude = 1 / (f ** (a + d)[:, None, None] + (f ** (a - d)[:, None])[:, :, None])   # (n, 1, s) + (n, s, 1)
    magnitude[:, 0, 0] = 0
    return magnitude


def spectrum_images(n, size, rng):
    """Clouds: random phases under a random 1/f spectrum, in three random colours [generators]."""
    normal = partial(torch.randn, generator=rng, device=rng.device)
    slope = 0.5 + 3 * torch.rand(n, generator=rng, device=rng.device)
    magnitude = spectrum_magnitude(slope, 0.05 * normal(n), size)[:, None, :, :size // 2 + 1]
    waves = torch.fft.rfft2(normal(n, 3, size, size))                                     # (n, 3, s, s/2 + 1), complex
    image = torch.fft.irfft2(waves / waves.abs().clamp(min=1e-12) * magnitude, s=(size, size))
    image = image / image.std((2, 3), keepdim=True)            # the mean is 0: no wave is constant
    colours = torch.linalg.qr(normal(n, 3, 3)).Q * torch.rand(n, 1, 3, generator=rng, device=rng.device)     # turned axes, each with a gain
    image = torch.einsum("nij,njhw->nihw", colours, image)                                # (n, 3, s, s)
    low, high = image.amin((1, 2, 3), keepdim=True), image.amax((1, 2, 3), keepdim=True)
    return (image - low) / (high - low)


def leaf_radius_cdf(smallest=0.03):
    """200 radii, in sides of the picture, and the probability of one up to each: density r^-3 - 1 [generators].   -> (200,), (200,)"""
    radii = torch.linspace(smallest, 1, 200)
    density = radii ** -3 - 1
    return radii, density.cumsum(0) / density.sum()


def leaves_images(n, size, rng, leaves=200, smallest=0.1):
    """Dead leaves: flat discs, squares, rectangles, triangles and quadrilaterals that hide one another [generators].

    Laid from front to back: a leaf takes what is still empty, for all n pictures at once. The last one takes what is left.
    """
    device = rng.device
    uniform = partial(torch.rand, generator=rng, device=rng.device)
    radii, cdf = (values.to(device) for values in leaf_radius_cdf(smallest))
    radius = radii[torch.searchsorted(cdf, uniform(leaves, n)).clamp(max=199)]            # (leaves, n)
    centre_x, centre_y, colour = uniform(leaves, n), uniform(leaves, n), uniform(leaves, n, 3)
    # corners on the circle, counter-clockwise; a triangle's third counts twice
    quarter, tilt, free = math.pi / 2 * torch.arange(4, device=device), math.pi / 2 * uniform(leaves, n, 1), uniform(leaves, n, 4)
    square = (quarter + math.pi / 4).expand(leaves, n, 4)                                 # angles of the corners
    rectangle = torch.cat([tilt, math.pi - tilt, math.pi + tilt, 2 * math.pi - tilt], 2)  # (leaves, n, 4)
    triangle = 2 * math.pi * free[..., [0, 1, 2]].sort(2).values[..., [0, 1, 2, 2]]
    kinds = torch.stack([square, square + 2 * math.pi * uniform(leaves, n, 1), rectangle, triangle, 2 * math.pi * free.sort(2).values])
    kind = torch.randint(6, (leaves, n), generator=rng, device=device)                    # 5 = a disc
    angle = kinds.gather(0, kind.clamp(max=4)[None, :, :, None].expand(1, -1, -1, 4))[0]  # (leaves, n, 4)
    x, y = centre_x[..., None] + radius[..., None] * angle.cos(), centre_y[..., None] + radius[..., None] * angle.sin()
    edge_x, edge_y = x.roll(-1, 2) - x, y.roll(-1, 2) - y
    place = (torch.arange(size, device=device) + 0.5) / size                              # (s,) centres of pixels
    first = torch.full((n, size, size), leaves, dtype=torch.long, device=device)          # the leaf that is seen
    for leaf in range(leaves):
        # inside = left of every edge: edge × (p - corner) >= 0, a part by column and a part by row
        by_column = -edge_y[leaf][..., None] * (place - x[leaf][..., None])               # (n, 4, s)
        by_row = edge_x[leaf][..., None] * (place - y[leaf][..., None])                   # (n, 4, s)
        polygon = (by_column[:, :, None, :] + by_row[:, :, :, None]).amin(1) >= 0         # (n, s, s)
        disc = ((place - centre_x[leaf][:, None]) ** 2)[:, None, :] + ((place - centre_y[leaf][:, None]) ** 2)[:, :, None]
        inside = torch.where((kind[leaf] == 5)[:, None, None], disc <= (radius[leaf] ** 2)[:, None, None], polygon)
        first[inside & (first == leaves)] = leaf
        if leaf % 20 == 19 and not (first == leaves).any():
            break
    seen = first.clamp(max=leaves - 1).flatten(1)[..., None].expand(-1, -1, 3)            # (n, s·s, 3)
    return colour.transpose(0, 1).gather(1, seen).transpose(1, 2).unflatten(2, (size, size))


def ifs_points(maps, choices):
    """The chaos game: from the origin, apply the chosen map of a system again and again [generators].

    maps (n, k, 6): x, y -> a x + b y + e, c x + d y + f in the order a b c d e f. choices (steps, n, walkers) -> two (steps, n, walkers)
    """
    x = y = torch.zeros(choices.shape[1:], dtype=maps.dtype, device=maps.device)
    xs, ys = torch.empty(2, *choices.shape, dtype=maps.dtype, device=maps.device)
    for step, choice in enumerate(choices):
        a, b, c, d, e, f = maps.gather(1, choice[..., None].expand(-1, -1, 6)).unbind(2)  # (n, walkers) each
        x, y = a * x + b * y + e, c * x + d * y + f
        xs[step], ys[step] = x, y
    return xs, ys


def fractal_images(n, size, rng, background=None, walk=220, least=0.1):
    """Attractors of 2 to 7 contractive affine maps, coloured by density, before `background` (n, 3, s, s) or a plain colour [generators].

    The maps' singular values are drawn so that their sum, the smaller one twice, is right for a picture that is neither dust nor a
    blot; pictures of which fewer than `least` of the pixels are hit are drawn again.
    """
    device, found, walkers = rng.device, torch.empty(0, 4, size, size, device=rng.device), max(64, size ** 2 // 16)
    uniform = partial(torch.rand, generator=rng, device=rng.device)

    def turn(angle):                                                                      # (n, 7) -> (n, 7, 2, 2)
        return torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).unflatten(-1, (2, 2))
    while len(found) < n:
        number = torch.randint(2, 8, (n,), generator=rng, device=device)
        there = torch.arange(7, device=device) < number[:, None]                          # (n, 7)
        wanted, singular = (5 + number + uniform(n)) / 2, torch.zeros(n, 7, 2, device=device)
        while not (done := singular[:, 0, 0] > 0).all():                                  # rejection: the first map takes what is left
            drawn = uniform(n, 7, 2).sort(2, descending=True).values
            others = ((drawn[..., 0] + 2 * drawn[..., 1]) * there).sum(1) - 2 * drawn[:, 0, 1]
            drawn[:, 0, 1] = (wanted - others) / 2
            fits = (drawn[:, 0, 1] >= 0) & (drawn[:, 0, 1] <= drawn[:, 0, 0])
            singular = torch.where((fits & ~done)[:, None, None], drawn, singular)
        signs = (uniform(n, 7, 1, 2) < 0.5).float() * 2 - 1
        linear = turn(2 * math.pi * uniform(n, 7)) @ (singular[..., None] * turn(2 * math.pi * uniform(n, 7))) * signs
        maps = torch.cat([linear.flatten(2), 2 * uniform(n, 7, 2) - 1], 2)                # (n, 7, 6)
        chance = (singular.prod(2) + 1e-3) * there                                        # a map's share of the area, |det|
        choices = torch.multinomial(chance, walk * walkers, True, generator=rng).view(n, walk, walkers).transpose(0, 1)
        place = torch.stack([points[20:].transpose(0, 1).flatten(1) for points in ifs_points(maps, choices)])     # (2, n, points)
        low, high = place.amin(2, keepdim=True), place.amax(2, keepdim=True)
        place = ((place - low) / (high - low).clamp(min=1e-6) * (size - 1)).round().long()
        count = torch.zeros(n, size * size, device=device).scatter_add_(1, place[1] * size + place[0], torch.ones_like(place[0]).float())
        density = (count / count.amax(1, keepdim=True)).sqrt()[:, None]                   # (n, 1, s·s)
        saturation, value = 0.3 + 0.7 * uniform(n, 1, 1), 0.5 + 0.5 * uniform(n, 1, 1)
        sixth = (torch.tensor([5, 3, 1], device=device).view(3, 1) + 6 * (density + uniform(n, 1, 1))) % 6          # of the hue circle
        colour = value * (1 - saturation * torch.minimum(sixth, 4 - sixth).clamp(0, 1))   # (n, 3, s·s)
        hit = (count > 0).float()[:, None]                                                # (n, 1, s·s)
        image = torch.cat([colour, hit], 1).unflatten(2, (size, size))
        found = torch.cat([found, image[hit.mean((1, 2)) >= least]])
    background = uniform(n, 3, 1, 1) if background is None else background
    return torch.where(found[:n, 3:] > 0, found[:n, :3], background)


def shader_images(n, size, rng, width=24, layers=4):
    """What a small random network of the coordinates paints: a stand-in for pictures of shader programs [inferred].

    Each picture has its own weights, zoom, turn, offset and time; a layer's units are sines, cosines, tanh, bumps, |u| and sawteeth.
    """
    uniform = partial(torch.rand, generator=rng, device=rng.device)
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, size, device=rng.device)] * 2, indexing="ij")
    x, y, zoom, angle = x.flatten(), y.flatten(), 2 ** (3 * uniform(n, 1)), 2 * math.pi * uniform(n, 1)
    across = zoom * (angle.cos() * x - angle.sin() * y) + 2 * uniform(n, 1) - 1           # (n, s·s)
    down = zoom * (angle.sin() * x + angle.cos() * y) + 2 * uniform(n, 1) - 1
    time = (0.1 + 9.9 * uniform(n, 1)).sin().expand_as(across)
    u = torch.stack([across, down, (across ** 2 + down ** 2).sqrt(), torch.atan2(down, across), time, torch.ones_like(time)], 1)
    for layer in range(layers + 1):                                                       # the last one is the colours
        fan_in, fan_out = u.shape[1], 3 if layer == layers else width
        u = torch.randn(n, fan_out, fan_in, generator=rng, device=rng.device) @ u * (1.5 / fan_in ** 0.5)           # (n, width, s·s)
        if layer < layers:
            a, b, c, d, e, f = u.tensor_split(6, 1)
            u = torch.cat([a.sin(), b.cos(), c.tanh(), (-d ** 2).exp(), e.abs(), f - f.floor()], 1)
    return u.sigmoid().unflatten(2, (size, size))


def random_generator_images(n, size, rng, widths=(64, 48, 32, 24)):
    """A StyleGAN-like generator whose weights were never trained; one draw of weights for all n, so ask for 50 to 100 [generators]."""
    normal = partial(torch.randn, generator=rng, device=rng.device)
    uniform = partial(torch.rand, generator=rng, device=rng.device)

    def pink(side):                                                                       # noise of 1/f^α, deviation 1: (n, 1, s, s)
        f = (torch.fft.fftfreq(side)[:, None] ** 2 + torch.fft.rfftfreq(side) ** 2).sqrt().to(rng.device)
        f[0, 0] = math.inf
        image = torch.fft.irfft2(torch.fft.rfft2(normal(n, 1, side, side)) * f ** -(0.5 + uniform(1)), s=(side, side))
        return image / image.std((2, 3), keepdim=True)
    x, rgb, side = normal(1, widths[0], 4, 4).expand(n, -1, -1, -1), torch.zeros(n, 3, 4, 4, device=rng.device), 4     # a constant
    for stage, width in enumerate(widths):
        for first in (True, False):
            if first and stage:
                x, rgb, side = *(F.interpolate(maps, scale_factor=2, mode="bilinear") for maps in (x, rgb)), 2 * side
            weight, style = normal(width, x.shape[1], 3, 3), F.leaky_relu(normal(n, x.shape[1]), 0.2)
            size_of = (style ** 2 @ (weight ** 2).sum((2, 3)).T).sqrt()                   # (n, width): what the style makes of the weights
            x = F.conv2d(x * style[..., None, None], weight, padding=1) / size_of[..., None, None]
            x = 2 ** 0.5 * F.relu(x + 0.3 * uniform(1) * pink(side) + 0.4 * uniform(1, width, 1, 1) - 0.2)
        rgb = rgb + F.conv2d(x, normal(3, width, 1, 1) / width ** 0.5)
    rgb = F.interpolate(rgb, (size, size), mode="bilinear", antialias=True)
    rgb = (rgb - rgb.mean((2, 3), keepdim=True)) / rgb.std((2, 3), keepdim=True)
    # colours as photographs have them: mean and deviation of each channel, each with a spread of its own
    photographs = [[.483, .455, .401], [.145, .142, .161], [.219, .213, .213], [.063, .062, .069]]
    mean, mean_spread, std, std_spread = torch.tensor(photographs, device=rng.device)
    mean, std = mean + mean_spread * normal(n, 3), (std + std_spread * normal(n, 3)).abs()
    return (mean[..., None, None] + std[..., None, None] * rgb).clamp(0, 1)


def strokes(pixels, rng):
    """Bright marks on black, for teachers of grey digits and clothes [inferred].   (n, C, H, W) -> (n, 1, H, W), both in [0, 1]

    Random weights make grey, half of them are inverted, and a soft threshold leaves 5 to 50 % of a picture bright.
    """
    uniform = partial(torch.rand, generator=rng, device=rng.device)
    n, weights = len(pixels), uniform(len(pixels), pixels.shape[1], 1, 1)
    grey = (pixels * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)         # (n, 1, H, W)
    grey = torch.where(uniform(n, 1, 1, 1) < 0.5, 1 - grey, grey)                         # half of them inverted
    ordered = grey.flatten(1).sort(1).values
    level = ordered.gather(1, ((0.5 + 0.45 * uniform(n, 1)) * ordered.shape[1]).long())   # (n, 1)
    steepness = 2 ** (1 + 3 * uniform(n, 1, 1, 1))
    return torch.sigmoid(steepness * (grey - level[..., None, None]) / grey.std((1, 2, 3), keepdim=True).clamp(min=1e-6))


GENERATORS = {"noise": noise_images, "spectrum": spectrum_images, "leaves": leaves_images, "fractal": fractal_images,
              "shader": shader_images, "random-generator": random_generator_images}


def procedural_pixels(name, n, data, settings, rng):
    """n pictures of a generator in the shape of the teacher's data, made at 32x32 or larger.   -> (n, C, H, W)"""
    size, more = max(32, *data.image_shape[1:]), {}
    if name == "noise":                                        # made smaller it would be paler
        size, more = max(data.image_shape[1:]), dict(mean=data.mean, std=data.std)
    if name == "fractal":
        more = dict(background=spectrum_images(n, size, rng))
    pixels = GENERATORS[name](n, size, rng, **more)
    return fit_pixels(strokes(pixels, rng) if settings.strokes else pixels, data)


# ------------------------------------------------------------------------------- augmentation: pixels (N, C, H, W) in [0, 1] -> the same
def mixup(pixels, coefficients, order):
    """(1 - λ) x + λ x', x' another image of the batch, λ one number an image [code].   (N, C, H, W), (N,), (N,) -> (N, C, H, W)"""
    return torch.lerp(pixels, pixels[order], coefficients.view(-1, 1, 1, 1))


def augment_surrogates(pixels, settings, rng):
    """The training transform, in the code's order. The presets of real sets turn elastic and inversion off."""
    n, device = len(pixels), pixels.device
    fill = pixels.mean((0, 2, 3))[:, None, None] if settings.fill == "mean" else 0.0      # what comes in from outside

    def some(chance):
        return torch.rand(n, generator=rng, device=device) < chance
    pixels = rand_augment(pixels, rng, settings.randaugment, settings.magnitude, fill)
    if settings.elastic:
        pixels = torch.where(some(0.5)[:, None, None, None], elastic(pixels, rng), pixels)
    if settings.invert:
        pixels = torch.where(some(settings.invert)[:, None, None, None], 1 - pixels, pixels)
    top, left = torch.randint(0, 2 * settings.pad + 1, (2, n), generator=rng, device=device)
    pixels = crop_by_offsets(pixels - fill, settings.pad, top, left, some(0.5) if settings.mirror else None) + fill
    if settings.mixup:
        pixels = mixup(pixels, torch.rand(n, generator=rng, device=device), torch.randperm(n, generator=rng, device=device))
    return pixels


# ------------------------------------------------------------------------------------ the trick: pairs from either side of a boundary
def cross_entropy_step(classify, pixels, labels):
    """One forward and backward pass.   -> confidence (N,), class (N,), gradient of CE(labels) with respect to pixels"""
    with torch.enable_grad():
        pixels = pixels.detach().requires_grad_()
        logits = classify(pixels)
        gradient, = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), pixels)         # rows are independent
    return *logits.detach().softmax(1).max(1), gradient


def boundary_pairs(classify, pixels, targets, step=2 / 255, radius=32 / 255, iterations=20, threshold=0.9, grow=1.1, shrink=0.5):
    """Targeted signed steps, "bold driver": longer while the boundary is not reached, half and back where it was crossed too far [code].

    `classify`: pixels in [0, 1] -> logits, of a network in eval mode; targets (N,): no image may be in its target class already. A pair
    is found when a step crosses into the target class and the confidence is under `threshold` on both sides; its image leaves the
    batch then. One forward and backward pass an iteration: a step that is taken back keeps the gradient of where it came from.
    -> after (N', C, H, W), before (N', C, H, W), rows (N',) of `pixels` they come from, iterations (N',), from 0, in which they were found
    """
    low, high = (pixels - radius).clamp(0, 1), (pixels + radius).clamp(0, 1)
    rows, size = torch.arange(len(pixels), device=pixels.device), torch.full_like(pixels[:, :1, :1, :1], step)
    here, (confidence, _, gradient) = pixels, cross_entropy_step(classify, pixels, targets)
    found = []
    for iteration in range(iterations):
        trial = torch.minimum(torch.maximum(here - size * gradient.sign(), low[rows]), high[rows])
        trial_confidence, predicted, trial_gradient = cross_entropy_step(classify, trial, targets[rows])
        crossed = predicted == targets[rows]
        close = crossed & (trial_confidence < threshold) & (confidence < threshold)
        found.append((trial[close], here[close], rows[close], torch.full_like(rows[close], iteration)))
        back = crossed[:, None, None, None]                                               # too far: stay, with half the step
        size = torch.where(back, shrink * size, grow * size)
        here, gradient = torch.where(back, here, trial), torch.where(back, gradient, trial_gradient)
        confidence = torch.where(crossed, confidence, trial_confidence)
        here, gradient, confidence, rows, size = (values[~close] for values in (here, gradient, confidence, rows, size))
        if not len(rows):
            break
    return tuple(torch.cat(parts) for parts in zip(*found))


def deeper(classify, pixels, labels, step=4 / 255, radius=16 / 255):
    """One signed step further into an image's class, within `radius` [code; direction inferred].   (N, C, H, W), (N,) -> (N, C, H, W)"""
    _, _, gradient = cross_entropy_step(classify, pixels, labels)
    return torch.minimum(torch.maximum(pixels - step * gradient.sign(), pixels - radius), pixels + radius).clamp(0, 1)


def attacked_images(teacher, pixels, pseudo_labels, data, settings, rng):
    """Up to four images of each: after, before, and both a step deeper.   -> (N', C, H, W), how many images the teacher was asked about"""
    asked = []

    def classify(pixels):
        asked.append(len(pixels))
        with autocast(settings, pixels.device):
            return teacher(normalize(pixels, data)).float()
    with torch.no_grad(), frozen(teacher):
        seen, targets = classify(pixels).argmax(1), pseudo_labels
        if settings.attack_target == "random":                 # any class but the one that is seen
            targets = (seen + torch.randint(1, data.num_classes, seen.shape, generator=rng, device=seen.device)) % data.num_classes
        pixels, targets = pixels[seen != targets], targets[seen != targets]
        if len(pixels):
            after, before, rows, _ = boundary_pairs(classify, pixels, targets, settings.attack_step / 255, settings.attack_radius / 255,
                                                    settings.attack_iterations, settings.attack_threshold)
            pixels = torch.cat([after, before])
        if len(pixels):                                        # else nothing was to be crossed, or nothing crossed
            labels = torch.cat([targets[rows], classify(before).argmax(1)])
            further = deeper(classify, pixels, labels, settings.deeper_step / 255, settings.deeper_radius / 255)
            pixels = torch.cat([pixels, further])
    return pixels, sum(asked)


# ---------------------------------------------------------------------------------------------------------- what a set is worth
@torch.no_grad()
def inspect_surrogate(teacher, surrogate, data, settings):
    """What the teacher sees in a set, 10,000 pictures of it at most. surrogate (M, C, H, W) uint8 -> dict, floats but for the last

    relative_entropy and relative_entropy_augmented   of its first choices, raw and as training shows the pictures; 1 = even
    confidence                                        mean largest probability
    feature_spread and feature_spread_unit            of what the last linear layer takes, as it is and at length 1
    class_share                                       the part of the pictures in each class, a list of K
    """
    rng = torch.Generator(surrogate.device).manual_seed(0)
    shown = surrogate[torch.randperm(len(surrogate), generator=rng, device=surrogate.device)[:10_000]]
    layer, logits, features, changed = last_linear(teacher), [], [], []
    with frozen(teacher), recorded_inputs([layer]) as seen:
        for pixels in (shown / 255).split(500):
            augmented = augment_surrogates(pixels, settings, rng)
            with autocast(settings, surrogate.device):
                logits.append(teacher(normalize(pixels, data)).float())
                features.append(seen[layer].float())
                changed.append(teacher(normalize(augmented, data)).argmax(1))
    logits, features, changed = torch.cat(logits), torch.cat(features), torch.cat(changed)
    counts, changed_counts = (torch.bincount(classes, minlength=data.num_classes) for classes in (logits.argmax(1), changed))
    return dict(relative_entropy=relative_entropy(counts), relative_entropy_augmented=relative_entropy(changed_counts),
                confidence=logits.softmax(1).amax(1).mean().item(), feature_spread=feature_spread(features, logits.argmax(1)),
                feature_spread_unit=feature_spread(F.normalize(features), logits.argmax(1)), class_share=(counts / len(shown)).tolist())


def balanced_pool(teacher, data, settings, draw, available=None, run=None):
    """Pictures, equally many in each class that the teacher sees. -> dict(pixels (M, C, H, W) uint8, labels (M,), seen (K,))

    `draw(start, n, rng) -> pixels (n, C, H, W)` gives pictures; it is asked for --pool-budget times as many as are kept at most, and
    for `available` in all. Without --balance the first ones are kept. seen: how many of each class there were before.
    """
    device, classes, chunk = next(teacher.parameters()).device, data.num_classes, 64
    rng, quota = torch.Generator(device).manual_seed(settings.seed), math.ceil(settings.pool_images / classes)
    room = quota * classes if settings.balance else min(settings.pool_images, available or settings.pool_images)
    budget = min(available or math.inf, settings.pool_budget * room if settings.balance else room)
    pixels = torch.zeros(room, *data.image_shape, dtype=torch.uint8, device=device)
    labels, seen = torch.full((room,), -1, device=device), torch.zeros(classes, dtype=torch.long, device=device)
    state = dict(rng=rng, pixels=pixels, labels=labels, seen=seen, generation_step=0, seconds_generation=0.0, images_synthesized=0,
                 teacher_queries=0)
    if run:
        run.restore(state)
    with torch.no_grad(), frozen(teacher):
        for step in steps(state, "generation", math.ceil(budget / chunk), run):
            if settings.balance and (seen >= quota).all():
                break
            fresh = (255 * draw(step * chunk, min(chunk, budget - step * chunk), rng)).round().to(torch.uint8)              # (n, C, H, W)
            with autocast(settings, device):
                predicted = teacher(normalize(fresh / 255, data)).argmax(1)               # (n,)
            one_hot = F.one_hot(predicted, classes)                                       # (n, K)
            rank = seen[predicted] + (one_hot.cumsum(0) * one_hot).sum(1) - 1             # how many of its class came before
            place = predicted * quota + rank if settings.balance else step * chunk + torch.arange(len(fresh), device=device)
            kept = (rank < quota) | (not settings.balance)
            pixels[place[kept]], labels[place[kept]] = fresh[kept], predicted[kept]
            seen += one_hot.sum(0)
            state["images_synthesized"] += len(fresh)
            state["teacher_queries"] += len(fresh)
    if settings.balance:                                       # short classes repeat theirs, empty ones the others' [inferred]
        rows, nth = torch.arange(room, device=device), torch.arange(room, device=device) % quota
        rows += nth % seen.clamp(min=1).repeat_interleave(quota) - nth
        empty, there = (labels[rows] < 0).nonzero()[:, 0], (labels[rows] >= 0).nonzero()[:, 0]
        there = there[torch.randperm(len(there), generator=rng, device=device)]           # of all other classes alike
        rows[empty] = rows[there[torch.arange(len(empty), device=device) % len(there)]]
        pixels, labels = pixels[rows], labels[rows]
    if run:
        run.report(event="pool", relative_entropy_before=relative_entropy(seen), images=len(labels), fewest_of_a_class=int(seen.min()),
                   relative_entropy=relative_entropy(torch.bincount(labels, minlength=classes)))
    return dict(pixels=pixels, labels=labels, seen=seen)


# ------------------------------------------------------------------------------------------------------- the algorithm
def check(settings):
    """Raises BadInput for settings that make no sense."""
    if settings.magnitude > 30 or settings.invert > 1 or not 0 < settings.attack_share <= 1 or not 0 < settings.attack_threshold <= 1:
        raise BadInput("--magnitude must be 0 to 30, --invert 0 to 1, --attack-share and --attack-threshold above 0 and at most 1")


def distill(teacher, student, data, settings, run=None, *, surrogate, pseudo_labels):
    """Train `student` in place on pictures that are not the teacher's data; `teacher` stays as it is. No real label is passed in.

    `data`: a DataSpec. `settings`: the fields of a preset and `seed`; optionally `precision`. `surrogate`: a pool (M, C, H, W) uint8 in
    the shape of the teacher's data; `pseudo_labels` (M,): the teacher's predictions on it; `balanced_pool` gives both. All on one device.
    The student comes back in train mode. Raises BadInput as `check` does and for another pool, FloatingPointError for a loss not finite.
    """
    check(settings)
    if surrogate.dtype != torch.uint8 or surrogate.shape[1:] != torch.Size(data.image_shape):
        raise BadInput(f"surrogate must be uint8, each {tuple(data.image_shape)}, not {surrogate.dtype}, {tuple(surrogate.shape[1:])}")
    device, m, size = next(student.parameters()).device, len(surrogate), settings.batch_size
    rng = torch.Generator(device).manual_seed(settings.seed ^ 2 ** 31)         # not the pool's stream
    share = settings.attack_share * settings.boundary_attack
    attacked = torch.zeros(math.ceil(share * m), *data.image_shape, dtype=torch.uint8, device=device)
    optimizer = build_optimizer(student, settings.optimizer, settings.lr_student, settings.weight_decay, nesterov=True)
    state = dict(student=student, optimizer=optimizer, rng=rng, batches=Shuffled(rng), attacked_batches=Shuffled(rng),
                 origins=Shuffled(rng), attacked=attacked, attacked_count=0, answers=torch.zeros(data.num_classes, device=device),
                 means=Means("loss_kd", "surrogate_agreement", "teacher_entropy", device=device), epoch=0, boundary_step=0,
                 distillation_step=0, seconds_boundary=0.0, seconds_distillation=0.0, student_steps=0, teacher_queries=0,
                 images_synthesized=m)
    if run:
        run.restore(state)

    for epoch in range(state["epoch"], settings.epochs):
        set_lr(optimizer, 1e-6 + cosine(settings.lr_student - 1e-6, epoch, settings.epochs))
        # -------- (1) Pixels, now and then: across a boundary of the teacher, min CE(T(x), target), one image from either side
        if share and epoch * settings.attacks // settings.epochs > (epoch - 1) * settings.attacks // settings.epochs:
            origins = math.ceil(len(attacked) / 4)             # each gives four images at most
            chunks = math.ceil(origins / 256)
            for step in steps(state, "boundary", chunks, run):
                if step == 0:
                    state["attacked_count"] = 0
                    state["attacked_batches"].restart()
                rows, begin = state["origins"].full(m, min(256, origins - 256 * step)), state["attacked_count"]
                pixels = augment_surrogates(surrogate[rows] / 255, settings, rng)         # (N, C, H, W)
                made, asked = attacked_images(teacher, pixels, pseudo_labels[rows], data, settings, rng)  # (N', C, H, W), N' up to 4 N
                end = min(begin + len(made), len(attacked))
                attacked[begin:end] = (255 * made[:end - begin]).round().to(torch.uint8)
                state.update(attacked_count=end, images_synthesized=state["images_synthesized"] + end - begin,
                             teacher_queries=state["teacher_queries"] + asked)
                if run and step == chunks - 1 and end == 0:
                    run.report(event="note", text=f"epoch {epoch}: no image crossed a boundary; batches are clean until the next attack")
        # -------- (2) Student: min  T² KL(teacher || student), both on the identical images
        student.train()
        with frozen(teacher):
            for _ in steps(state, "distillation", math.ceil(m / size), run):
                across, parts = math.ceil(share * size) if state["attacked_count"] else 0, []
                if across < size:
                    parts.append(augment_surrogates(surrogate[state["batches"].full(m, size - across)] / 255, settings, rng))
                if across:                                     # as they are
                    parts.append(attacked[state["attacked_batches"].full(state["attacked_count"], across)] / 255)
                images = normalize(torch.cat(parts), data)                                # (N, C, H, W)
                with torch.no_grad(), autocast(settings, device):
                    teacher_logits = teacher(images).float()                              # (N, K)
                with autocast(settings, device):
                    student_logits = student(images).float()                              # (N, K)
                answers = [standardized(logits) if settings.standardize else logits for logits in (student_logits, teacher_logits)]
                loss_kd = kd_loss(*answers, settings.temperature) if settings.targets == "soft" else one_hot_loss(*answers)
                optimizer.zero_grad()
                loss_kd.backward()
                optimizer.step()
                predicted, p = teacher_logits.argmax(1), teacher_logits.softmax(1)
                state["means"].add(loss_kd, (student_logits.argmax(1) == predicted).float().mean(), -torch.xlogy(p, p).sum(1).mean())
                state["answers"] += torch.bincount(predicted, minlength=data.num_classes)
                state["student_steps"] += 1
                state["teacher_queries"] += len(images)
        state.update(epoch=epoch + 1, boundary_step=0, distillation_step=0)
        row = dict(**state["means"].take(), relative_entropy=relative_entropy(state["answers"]), attacked=state["attacked_count"])
        state["answers"].zero_()
        if run:
            run.report(epoch=epoch, **row, samples=newest_by_class(surrogate, pseudo_labels, min(data.num_classes, 20)))


# -------------------------------------------------------------------------------------- hyperparameters, command line
SYNTHETIC = dict(   # the released config, four operations [code]; T, 50,000 balanced pictures [notes]; set, budget, padding [inferred]
    epochs=400, batch_size=256, surrogate="shader", pool_images=50_000, pool_budget=5, balance=True, strokes=False, inspect_only=False,
    temperature=20.0, targets="soft", standardize=False, randaugment=4, magnitude=14, elastic=True, invert=0.1, mirror=True, pad=4,
    fill="mean", mixup=True, optimizer="sgd", lr_student=0.1, weight_decay=1e-4,
    # the threshold and which target [code]; else [inferred]
    boundary_attack=False, attack_share=0.5, attacks=400, attack_target="pseudo", attack_step=2.0, attack_radius=32.0,
    attack_iterations=20, attack_threshold=0.9, deeper_step=4.0, deeper_radius=16.0)
OF_REAL = dict(balance=False, strokes=False, elastic=False, invert=0.0, attack_target="random")
REAL = {**SYNTHETIC, **OF_REAL, "surrogate": "cifar100", "temperature": 2.0, "randaugment": 2}
MNIST = {**SYNTHETIC, "epochs": 12, "batch_size": 128, "surrogate": "leaves", "pool_images": 20_000, "strokes": True, "temperature": 4.0,
         "pool_budget": 3, "pad": 2, "optimizer": "adam", "lr_student": 2e-3, "weight_decay": 0.0, "attacks": 1,       # [inferred], all
         "randaugment": 1, "invert": 0.0, "fill": "black", "mixup": False}    # chosen by test accuracy on MNIST, seed 0
DIGITS = {**MNIST, "surrogate": "spectrum", "epochs": 40, "pool_images": 5000, "pool_budget": 4, "pad": 1}
PRESETS = {   # a real surrogate takes DATASET-real where there is one, unless --preset says otherwise
    "cifar10": SYNTHETIC,
    "cifar10-real": REAL,
    "cifar10-short": {**SYNTHETIC, "epochs": 60},                             # [inferred]
    "cifar100": SYNTHETIC,
    "cifar100-real": {**REAL, "surrogate": "cifar10"},
    "mnist": MNIST,
    "mnist-real": {**MNIST, **OF_REAL, "surrogate": "fashion_mnist"},
    "fashion_mnist": MNIST,
    "fashion_mnist-real": {**MNIST, **OF_REAL, "surrogate": "mnist"},
    "digits": DIGITS, "digits-real": {**DIGITS, **OF_REAL, "surrogate": "mnist"},
}
FLAGS = {
    "surrogate": f"{', '.join(GENERATORS)}, a data set's name, or folder:PATH with pictures in it",
    "pool_images": "pictures that are kept; with --balance the next multiple of the classes",
    "pool_budget": "with --balance: at most so many times as many are made", "temperature": "of both softmaxes",
    "balance": "equally many pictures of each class that the teacher sees",
    "strokes": "bright marks on black, of synthetic pictures; for teachers of grey digits and clothes",
    "targets": ("soft: the teacher's probabilities; one-hot: its first choice", ("soft", "one-hot")),
    "standardize": "logits of both networks, row by row, before the loss",
    "randaugment": "operations on each image; 0 = none", "magnitude": "of these operations, of 30; 0 = the least",
    "elastic": "bend half of the images", "invert": "probability that an image is inverted", "mirror": "half of the images",
    "pad": "pixels around an image before the random crop; 0 = none", "inspect_only": "say what the teacher sees in the set, and stop",
    "fill": ("what comes in from outside of a moved picture: the batch's mean colour, or black", ("mean", "black")),
    "mixup": "every image mixed with another of the batch, each pair by a coefficient of its own",
    "boundary_attack": "pictures pushed across the teacher's boundaries take --attack-share of each batch",
    "attack_share": "the part of each batch that was attacked; 1: no clean images",
    "attacks": "attacks in a run, spread evenly over its epochs; at most one in each",
    "attack_target": ("pseudo: the class seen before augmentation; random: another than is seen now", ("pseudo", "random")),
    "attack_step": "first step, of 255", "attack_radius": "largest change of a pixel, of 255",
    "attack_iterations": "steps at most", "attack_threshold": "largest confidence on both sides",
    "deeper_step": "the step on from there, of 255", "deeper_radius": "largest change of a pixel in it, of 255",
    "optimizer": ("sgd with Nesterov momentum 0.9, or adam", ("sgd", "adam")),
    "lr_student": "of that optimizer; cosine over the epochs to 1e-6", "weight_decay": "of the student",
}
TEXT_FLAGS = {"pool": "file of the pool [checkpoints/TEACHER.SURROGATE-seedN.pt, SURROGATE-unbalanced with --no-balance]"}
POOL_SETTINGS = ("seed", "surrogate", "pictures", "pool_images", "pool_budget", "balance", "strokes", "precision")


def stored_pool(run, settings, available=None, read=None):
    """The pool of this teacher, set and seed: read from its file, or made now and kept there, with what `real_pictures` gave, if any."""
    order = torch.randperm(available or 0, generator=torch.Generator().manual_seed(settings.seed ^ 2 ** 30))

    def draw(start, n, rng):
        if settings.surrogate in GENERATORS:
            return procedural_pixels(settings.surrogate, n, run.data, settings, rng)
        return fit_pixels(read(order[start:start + n], max(run.data.image_shape[1:])).to(run.device), run.data)
    name = re.sub(r"\W+", "_", settings.surrogate) + "-unbalanced" * (not settings.balance)
    path = settings.pool or f"checkpoints/{run.teacher.name}.{name}-seed{settings.seed}.pt"
    return stored_stage(run, settings, "surrogate pool", path, POOL_SETTINGS,
                        lambda progress: balanced_pool(run.teacher.model, run.data, settings, draw, available, progress))


@command_line
def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    pairs = dict.fromkeys(("mnist", "fashion_mnist"), ("lenet5_bn", "lenet5_half_bn"))
    wanted = "surrogate_kd", __doc__, PRESETS, FLAGS, TEXT_FLAGS, pairs
    settings = read_settings(argv, *wanted)
    real, available, read = settings.surrogate not in GENERATORS, None, None
    if real and f"{settings.preset}-real" in PRESETS and not any(word.startswith("--preset") for word in argv):
        settings = read_settings([*argv, "--preset", f"{settings.preset}-real"], *wanted)
    check(settings)
    settings.pictures = ""                                     # tells folders apart; compared on resume, and with a kept pool
    if real:
        if settings.surrogate not in DATASETS and not settings.surrogate.startswith("folder:"):
            raise BadInput(f"unknown surrogate '{settings.surrogate}'; choose from {FLAGS['surrogate']}")
        own = read_classifier(settings.teacher)["dataset"] if is_file_name(settings.teacher) else settings.dataset
        if same_data(settings.surrogate, own):
            raise BadInput(f"{settings.surrogate} is the teacher's own data; name another --surrogate, or type regulated_kd.py --mode kd")
        available, read, settings.pictures = real_pictures(settings.surrogate, settings.data_dir)
    run = Run("surrogate_kd", settings)
    last_linear(run.teacher.model)                             # the report needs one: refused now, not when the pool is made
    pool = stored_pool(run, settings, available, read)
    surrogate, labels, classes = pool["pixels"].to(run.device), pool["labels"].to(run.device), run.data.num_classes
    found = inspect_surrogate(run.teacher.model, surrogate, run.data, settings)
    share = found["class_share"]
    run.report(event="surrogate", **found, text=(
        f"{settings.surrogate}, {len(surrogate)} pictures: relative entropy of predictions {found['relative_entropy']:.3f}, augmented "
        f"{found['relative_entropy_augmented']:.3f}; class {share.index(max(share))} has {100 * max(share):.0f} %, {share.count(0)} of "
        f"{classes} none; mean confidence {found['confidence']:.3f}; feature spread {found['feature_spread']:.3f}"))
    if settings.inspect_only:
        run.restore({})
        save_samples(run.folder / "samples.png", newest_by_class(surrogate, labels, min(classes, 20)))
        run.finish(f"pictures by predicted class in {run.folder / 'samples.png'}")
        return
    if settings.boundary_attack:
        torch.backends.cudnn.benchmark = False                 # images leave the batch: nothing to be tried out
    distill(run.teacher.model, run.student, run.data, settings, run, surrogate=surrogate, pseudo_labels=labels)
    run.finish()


if __name__ == "__main__":
    main()
