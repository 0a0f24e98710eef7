"""Shapes of the parameters of well-known models, in their order."""

Shapes = list[tuple[int, ...]]


def resnet50() -> Shapes:
    """He et al. 2016, "Deep Residual Learning for Image Recognition", table 1, as in torchvision: 161 arrays,
    25.6 M parameters."""

    def conv(inputs: int, outputs: int, kernel: int) -> Shapes:
        """A convolution without bias, and the weight and bias of the batch normalization after it."""
        return [(outputs, inputs, kernel, kernel), (outputs,), (outputs,)]

    shapes, inputs = conv(3, 64, 7), 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += conv(inputs, width, 1) + conv(width, width, 3) + conv(width, 4 * width, 1)
            if block == 0:
                shapes += conv(inputs, 4 * width, 1)  # of the shortcut
            inputs = 4 * width
    return [*shapes, (1000, inputs), (1000,)]


def bert_base() -> Shapes:
    """Devlin et al. 2019, "BERT", the base model, uncased: 199 arrays, 109.5 M parameters."""

    def linear(inputs: int, outputs: int) -> Shapes:
        return [(outputs, inputs), (outputs,)]

    hidden, inner = 768, 3072
    norm: Shapes = [(hidden,), (hidden,)]
    layer = 4 * linear(hidden, hidden) + norm + linear(hidden, inner) + linear(inner, hidden) + norm
    embeddings: Shapes = [(30522, hidden), (512, hidden), (2, hidden), *norm]
    return embeddings + 12 * layer + linear(hidden, hidden)
