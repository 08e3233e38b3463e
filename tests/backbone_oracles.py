"""Networks by hand in float64 NumPy, from arrays under the names of PyTorch's files.

Also makes such arrays, of small networks, at random.
"""

import math

import numpy as np

erf = np.vectorize(math.erf)


def conv(x, kernel, bias=None, stride=1, padding=(0, 0), groups=1):
    """Images ``[n, c, h, w]``, a kernel ``[out, in, h, w]``, as in PyTorch."""
    down, across = padding
    x = np.pad(x, ((0, 0), (0, 0), (down, down), (across, across)))
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[2:], (2, 3))
    windows = windows[:, :, ::stride, ::stride]
    if groups == 1:
        y = np.einsum("nchwij,ocij->nohw", windows, kernel, optimize=True)
    else:
        y = np.einsum("nchwij,cij->nchw", windows, kernel[:, 0], optimize=True)
    return y if bias is None else y + bias[:, None, None]


def batch_norm(x, arrays, name, eps=1e-5):
    mean, var, scale, bias = (
        arrays[f"{name}.{part}"].reshape(-1, *[1] * (x.ndim - 2))
        for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / np.sqrt(var + eps) * scale + bias


def layer_norm(x, arrays, name, eps=1e-6):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    y = (x - mean) / np.sqrt(var + eps)
    return y * arrays[f"{name}.weight"] + arrays[f"{name}.bias"]


def linear(x, arrays, name):
    return x @ arrays[f"{name}.weight"].T + arrays[f"{name}.bias"]


def gelu(x):
    return x * (1 + erf(x / np.sqrt(2))) / 2


def relu(x):
    return np.maximum(x, 0)


def max_pool(x, size, stride, padding=0):
    ends = (0, 0), (0, 0), (padding, padding), (padding, padding)
    x = np.pad(x, ends, constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (2, 3))
    return windows[:, :, ::stride, ::stride].max(axis=(4, 5))


def resnet(arrays, x):
    def convolved(x, name, stride=1):
        kernel = arrays[f"{name}.weight"]
        return conv(x, kernel, stride=stride, padding=(kernel.shape[2] // 2,) * 2)

    x = relu(batch_norm(convolved(x, "conv1", 2), arrays, "bn1"))
    x = max_pool(x, 3, 2, 1)
    for stage in range(1, 5):
        block = 0
        while f"layer{stage}.{block}.conv1.weight" in arrays:
            name = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            deep = f"{name}.conv3.weight" in arrays
            y = convolved(x, f"{name}.conv1", 1 if deep else stride)
            y = relu(batch_norm(y, arrays, f"{name}.bn1"))
            y = convolved(y, f"{name}.conv2", stride if deep else 1)
            y = batch_norm(y, arrays, f"{name}.bn2")
            if deep:
                y = convolved(relu(y), f"{name}.conv3")
                y = batch_norm(y, arrays, f"{name}.bn3")
            if f"{name}.downsample.0.weight" in arrays:
                x = convolved(x, f"{name}.downsample.0", stride)
                x = batch_norm(x, arrays, f"{name}.downsample.1")
            x, block = relu(x + y), block + 1
    return x.mean(axis=(2, 3))


def cubic(x, a=-0.75):
    """Keys' kernel; PyTorch's a is -0.75, and -0.5 where it antialiases."""
    x = abs(x)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def cubic_line(line, n):
    """A line ``[m, ...]`` at n places, its ends repeated."""
    made, m = [], len(line)
    for place in range(n):
        at = (place + 0.5) * m / n - 0.5
        near = range(math.floor(at) - 1, math.floor(at) + 3)
        made.append(sum(cubic(i - at) * line[min(max(i, 0), m - 1)] for i in near))
    return np.stack(made)


def vit(arrays, x, heads):
    """DINOv2 under the names of transformers, which interpolates without offset."""
    embeddings = "embeddings."
    kernel = arrays[f"{embeddings}patch_embeddings.projection.weight"]
    bias = arrays[f"{embeddings}patch_embeddings.projection.bias"]
    x = conv(x, kernel, bias, stride=kernel.shape[2])
    n, width, rows, columns = x.shape
    x = x.reshape(n, width, -1).transpose(0, 2, 1)
    positions = arrays[f"{embeddings}position_embeddings"][0]
    grid = math.isqrt(len(positions))
    patches = cubic_line(positions[1:].reshape(grid, grid, width), rows)
    patches = cubic_line(patches.transpose(1, 0, 2), columns).transpose(1, 0, 2)
    first = arrays[f"{embeddings}cls_token"][0] + positions[:1]
    x = np.concatenate([np.tile(first, (n, 1, 1)), x + patches.reshape(-1, width)], 1)
    layer = 0
    while f"encoder.layer.{layer}.norm1.weight" in arrays:
        name = f"encoder.layer.{layer}"
        y = layer_norm(x, arrays, f"{name}.norm1")
        q, k, v = (
            linear(y, arrays, f"{name}.attention.attention.{part}")
            .reshape(n, -1, heads, width // heads)
            .transpose(0, 2, 1, 3)
            for part in ("query", "key", "value")
        )
        logits = np.exp(q @ k.transpose(0, 1, 3, 2) / np.sqrt(width // heads))
        y = logits / logits.sum(-1, keepdims=True) @ v
        y = y.transpose(0, 2, 1, 3).reshape(n, -1, width)
        y = linear(y, arrays, f"{name}.attention.output.dense")
        x = x + y * arrays[f"{name}.layer_scale1.lambda1"]
        y = gelu(
            linear(layer_norm(x, arrays, f"{name}.norm2"), arrays, f"{name}.mlp.fc1")
        )
        y = linear(y, arrays, f"{name}.mlp.fc2")
        x, layer = x + y * arrays[f"{name}.layer_scale2.lambda1"], layer + 1
    return layer_norm(x, arrays, "layernorm")[:, 0]


def convnext(arrays, x):
    """Under the names of timm."""

    def normed(x, name):
        return layer_norm(x.transpose(0, 2, 3, 1), arrays, name).transpose(0, 3, 1, 2)

    x = conv(x, arrays["stem.0.weight"], arrays["stem.0.bias"], stride=4)
    x = normed(x, "stem.1")
    for stage in range(4):
        name = f"stages.{stage}.downsample"
        if f"{name}.0.weight" in arrays:
            kernel, bias = arrays[f"{name}.1.weight"], arrays[f"{name}.1.bias"]
            x = conv(normed(x, f"{name}.0"), kernel, bias, stride=2)
        block = 0
        while f"stages.{stage}.blocks.{block}.gamma" in arrays:
            name = f"stages.{stage}.blocks.{block}"
            kernel, bias = (arrays[f"{name}.conv_dw.{p}"] for p in ("weight", "bias"))
            y = conv(x, kernel, bias, padding=(3, 3), groups=len(kernel))
            y = layer_norm(y.transpose(0, 2, 3, 1), arrays, f"{name}.norm")
            y = linear(
                gelu(linear(y, arrays, f"{name}.mlp.fc1")), arrays, f"{name}.mlp.fc2"
            )
            y = (y * arrays[f"{name}.gamma"]).transpose(0, 3, 1, 2)
            x, block = x + y, block + 1
    return layer_norm(x.mean(axis=(2, 3)), arrays, "head.norm")


def efficientnet(arrays, x):
    """Under the names of efficientnet-pytorch, padded as in TensorFlow."""
    lite = "_blocks.0._se_reduce.weight" not in arrays

    def active(x):
        return np.clip(x, 0, 6) if lite else x / (1 + np.exp(-x))

    def convolved(x, name, norm, stride=1, groups=1):
        kernel = arrays[f"{name}.weight"]
        size = kernel.shape[2]
        ends = [(0, 0), (0, 0)]
        for length in x.shape[2:]:
            total = max((-(-length // stride) - 1) * stride + size - length, 0)
            ends.append((total // 2, total - total // 2))
        y = conv(np.pad(x, ends), kernel, stride=stride, groups=groups)
        return batch_norm(y, arrays, norm, 1e-3)

    def block(x, name, stride):
        y = x
        if f"{name}._expand_conv.weight" in arrays:
            y = active(convolved(y, f"{name}._expand_conv", f"{name}._bn0"))
        depthwise, norm = f"{name}._depthwise_conv", f"{name}._bn1"
        y = active(convolved(y, depthwise, norm, stride, y.shape[1]))
        if not lite:
            weights = y.mean((2, 3), keepdims=True)
            for part in ("_se_reduce", "_se_expand"):
                kernel, bias = (
                    arrays[f"{name}.{part}.{of}"] for of in ("weight", "bias")
                )
                weights = conv(weights, kernel, bias)
                weights = active(weights) if part == "_se_reduce" else weights
            y = y / (1 + np.exp(-weights))
        y = convolved(y, f"{name}._project_conv", f"{name}._bn2")
        return x + y if stride == 1 and x.shape == y.shape else y

    x = active(convolved(x, "_conv_stem", "_bn0", 2))
    for number, (_, stride, _) in enumerate(EFFICIENTNET):
        x = block(x, f"_blocks.{number}", stride)
    return active(convolved(x, "_conv_head", "_bn1")).mean((2, 3))


# Size of the kernel, stride and output channels of the blocks of a small EfficientNet:
# seven stages, of which the second has two blocks.
EFFICIENTNET = (
    *[(3, 1, 8), (3, 2, 12), (3, 1, 12), (5, 2, 16)],
    *[(3, 2, 20), (5, 1, 24), (5, 2, 28), (3, 1, 32)],
)


def inception_resnet(arrays, x):
    def layer(x, name, stride=1, padding=(0, 0)):
        y = conv(x, arrays[f"{name}.conv.weight"], stride=stride, padding=padding)
        return relu(batch_norm(y, arrays, f"{name}.bn", 1e-3))

    def path(x, name):
        """What keeps the size of the image."""
        place = 0
        while f"{name}.{place}.conv.weight" in arrays:
            _, _, height, width = arrays[f"{name}.{place}.conv.weight"].shape
            x = layer(x, f"{name}.{place}", padding=(height // 2, width // 2))
            place += 1
        return x

    def block(x, name, scale, active=True):
        parts = [layer(x, f"{name}.branch0"), path(x, f"{name}.branch1")]
        if f"{name}.branch2.0.conv.weight" in arrays:
            parts.append(path(x, f"{name}.branch2"))
        kernel, bias = (arrays[f"{name}.conv2d.{part}"] for part in ("weight", "bias"))
        y = conv(np.concatenate(parts, axis=1), kernel, bias) * scale + x
        return relu(y) if active else y

    def repeated(x, name, scale):
        place = 0
        while f"{name}.{place}.conv2d.weight" in arrays:
            x, place = block(x, f"{name}.{place}", scale), place + 1
        return x

    x = layer(layer(x, "conv2d_1a", 2), "conv2d_2a")
    x = max_pool(layer(x, "conv2d_2b", padding=(1, 1)), 3, 2)
    x = layer(layer(layer(x, "conv2d_3b"), "conv2d_4a"), "conv2d_4b", 2)
    x = repeated(x, "repeat_1", 0.17)
    wide = layer(layer(x, "mixed_6a.branch1.0"), "mixed_6a.branch1.1", padding=(1, 1))
    parts = [layer(x, "mixed_6a.branch0", 2), layer(wide, "mixed_6a.branch1.2", 2)]
    x = repeated(np.concatenate([*parts, max_pool(x, 3, 2)], axis=1), "repeat_2", 0.1)
    parts = []
    for branch in (0, 1):
        name = f"mixed_7a.branch{branch}"
        parts.append(layer(layer(x, f"{name}.0"), f"{name}.1", 2))
    name = "mixed_7a.branch2"
    wide = layer(layer(x, f"{name}.0"), f"{name}.1", padding=(1, 1))
    parts += [layer(wide, f"{name}.2", 2), max_pool(x, 3, 2)]
    x = repeated(np.concatenate(parts, axis=1), "repeat_3", 0.2)
    x = block(x, "block8", 1.0, active=False).mean(axis=(2, 3))
    return batch_norm(x @ arrays["last_linear.weight"].T, arrays, "last_bn", 1e-3)


class Drawn:
    """Arrays at random, in PyTorch's names and shapes."""

    def __init__(self, seed=0):
        self.draw, self.arrays = np.random.default_rng(seed), {}

    def conv(self, name, out, incoming, height, width=None, *, bias=False):
        shape = out, incoming, height, height if width is None else width
        self.array(f"{name}.weight", shape, np.sqrt(2 / np.prod(shape[1:])))
        if bias:
            self.array(f"{name}.bias", (out,), 0.1)

    def linear(self, name, out, incoming, *, bias=True):
        self.array(f"{name}.weight", (out, incoming), np.sqrt(1 / incoming))
        if bias:
            self.array(f"{name}.bias", (out,), 0.1)

    def norm(self, name, width, *, statistics=False):
        self.array(f"{name}.weight", (width,), 0.2, 1)
        self.array(f"{name}.bias", (width,), 0.2)
        if statistics:
            self.array(f"{name}.running_mean", (width,), 0.2)
            self.arrays[f"{name}.running_var"] = self.draw.uniform(0.5, 1.5, width)
            self.arrays[f"{name}.num_batches_tracked"] = np.array(7)

    def array(self, name, shape, scale, mean=0.0):
        self.arrays[name] = mean + scale * self.draw.normal(size=shape)

    def done(self):
        """Float32, as files have them."""
        return {
            name: value if value.dtype.kind == "i" else value.astype(np.float32)
            for name, value in self.arrays.items()
        }


def small_resnet(*, bottleneck=False, widths=(8, 12, 16, 24), seed=0, classes=5):
    made, incoming = Drawn(seed), widths[0]
    made.conv("conv1", widths[0], 3, 7)
    made.norm("bn1", widths[0], statistics=True)
    for stage, width in enumerate(widths, start=1):
        for block in range(2 if stage == 1 else 1):
            name = f"layer{stage}.{block}"
            out = 4 * width if bottleneck else width
            sizes = (1, 3, 1) if bottleneck else (3, 3)
            ins = (incoming, width, width)
            outs = (width, width, out) if bottleneck else (width, width)
            for place, (size, a, b) in enumerate(zip(sizes, ins, outs), start=1):
                made.conv(f"{name}.conv{place}", b, a, size)
                made.norm(f"{name}.bn{place}", b, statistics=True)
            if incoming != out or (stage > 1 and block == 0):
                made.conv(f"{name}.downsample.0", out, incoming, 1)
                made.norm(f"{name}.downsample.1", out, statistics=True)
            incoming = out
    made.linear("fc", classes, incoming)
    return made.done()


def small_vit(*, width=128, depth=2, patch=14, grid=3, seed=0):
    """DINOv2 under the names of transformers."""
    made = Drawn(seed)
    made.array("embeddings.cls_token", (1, 1, width), 0.5)
    made.array("embeddings.mask_token", (1, width), 0.5)
    made.array("embeddings.position_embeddings", (1, 1 + grid**2, width), 0.5)
    made.conv("embeddings.patch_embeddings.projection", width, 3, patch, bias=True)
    for layer in range(depth):
        name = f"encoder.layer.{layer}"
        for place in (1, 2):
            made.norm(f"{name}.norm{place}", width)
            made.array(f"{name}.layer_scale{place}.lambda1", (width,), 0.2, 0.5)
        for part in ("attention.query", "attention.key", "attention.value"):
            made.linear(f"{name}.attention.{part}", width, width)
        made.linear(f"{name}.attention.output.dense", width, width)
        made.linear(f"{name}.mlp.fc1", 4 * width, width)
        made.linear(f"{name}.mlp.fc2", width, 4 * width)
    made.norm("layernorm", width)
    return made.done()


def small_convnext(*, widths=(8, 12, 16, 24), seed=0):
    """Under the names of timm."""
    made = Drawn(seed)
    made.conv("stem.0", widths[0], 3, 4, bias=True)
    made.norm("stem.1", widths[0])
    for stage, width in enumerate(widths):
        if stage:
            made.norm(f"stages.{stage}.downsample.0", widths[stage - 1])
            name = f"stages.{stage}.downsample.1"
            made.conv(name, width, widths[stage - 1], 2, bias=True)
        for block in range(2 if stage == 0 else 1):
            name = f"stages.{stage}.blocks.{block}"
            made.conv(f"{name}.conv_dw", width, 1, 7, bias=True)
            made.norm(f"{name}.norm", width)
            made.linear(f"{name}.mlp.fc1", 4 * width, width)
            made.linear(f"{name}.mlp.fc2", width, 4 * width)
            made.array(f"{name}.gamma", (width,), 0.2, 0.5)
    made.norm("head.norm", widths[-1])
    made.linear("head.fc", 5, widths[-1])
    return made.done()


def small_efficientnet(*, lite=False, seed=0):
    """Under the names of efficientnet-pytorch."""
    made = Drawn(seed)
    made.conv("_conv_stem", 8, 3, 3)
    made.norm("_bn0", 8, statistics=True)
    incoming = 8
    for number, (size, _, out) in enumerate(EFFICIENTNET):
        name, inside = f"_blocks.{number}", (6 if number else 1) * incoming
        if number:
            made.conv(f"{name}._expand_conv", inside, incoming, 1)
            made.norm(f"{name}._bn0", inside, statistics=True)
        made.conv(f"{name}._depthwise_conv", inside, 1, size)
        made.norm(f"{name}._bn1", inside, statistics=True)
        if not lite:
            made.conv(f"{name}._se_reduce", incoming // 4, inside, 1, bias=True)
            made.conv(f"{name}._se_expand", inside, incoming // 4, 1, bias=True)
        made.conv(f"{name}._project_conv", out, inside, 1)
        made.norm(f"{name}._bn2", out, statistics=True)
        incoming = out
    made.conv("_conv_head", 40, incoming, 1)
    made.norm("_bn1", 40, statistics=True)
    made.linear("_fc", 5, 40)
    return made.done()


def small_inception_resnet(*, seed=0):
    """With one block of each kind."""
    made = Drawn(seed)

    def layer(name, out, incoming, height, width=None):
        made.conv(f"{name}.conv", out, incoming, height, width)
        made.norm(f"{name}.bn", out, statistics=True)

    for name, out, incoming, size in (
        ("1a", 32, 3, 3),
        ("2a", 32, 32, 3),
        ("2b", 64, 32, 3),
        ("3b", 80, 64, 1),
        ("4a", 192, 80, 3),
        ("4b", 256, 192, 3),
    ):
        layer(f"conv2d_{name}", out, incoming, size)
    layer("mixed_6a.branch0", 384, 256, 3)
    layer("mixed_6a.branch1.0", 192, 256, 1)
    layer("mixed_6a.branch1.1", 192, 192, 3)
    layer("mixed_6a.branch1.2", 256, 192, 3)
    for branch, outs in enumerate(((256, 384), (256, 256), (256, 256, 256))):
        incoming = 896
        for place, out in enumerate(outs):
            name = f"mixed_7a.branch{branch}.{place}"
            layer(name, out, incoming, 1 if place == 0 else 3)
            incoming = out
    for name, wide, width, sizes in (
        ("repeat_1.0", 256, 32, [(3, 3)]),
        ("repeat_2.0", 896, 128, [(1, 7), (7, 1)]),
        ("repeat_3.0", 1792, 192, [(1, 3), (3, 1)]),
        ("block8", 1792, 192, [(1, 3), (3, 1)]),
    ):
        layer(f"{name}.branch0", width, wide, 1)
        paths = [sizes] if len(sizes) > 1 else [sizes, 2 * sizes]
        for branch, path in enumerate(paths, start=1):
            layer(f"{name}.branch{branch}.0", width, wide, 1)
            for place, size in enumerate(path, start=1):
                layer(f"{name}.branch{branch}.{place}", width, width, *size)
        made.conv(f"{name}.conv2d", wide, (1 + len(paths)) * width, 1, bias=True)
    made.linear("last_linear", 512, 1792, bias=False)
    made.norm("last_bn", 512, statistics=True)
    made.linear("logits", 5, 512)
    return made.done()
