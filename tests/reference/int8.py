"""The int8 image tower as plain as can be: whole numbers in float64, where products of 8 bits are exact."""

from torch import Tensor, nn
from torch.nn import functional as F

from diptych.model.vision import VisionTransformer


def encode_int8(visual: VisionTransformer, image: Tensor) -> Tensor:
    """Features of pictures before the projection, all linear layers of the blocks in 8 bits."""
    x = visual.embed_patches(image).double()
    for block in visual.transformer.blocks():
        h = F.layer_norm(x, x.shape[-1:], block.ln_1.weight.double(), block.ln_1.bias.double())
        n, length, width = h.shape
        qkv = multiply(h, block.attn.in_proj).view(n, length, 3, block.attn.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        probabilities = (q @ k.transpose(2, 3) / (width / block.attn.heads) ** 0.5).softmax(dim=-1)
        x = x + multiply((probabilities @ v).transpose(1, 2).flatten(2), block.attn.out_proj)
        h = F.layer_norm(x, x.shape[-1:], block.ln_2.weight.double(), block.ln_2.bias.double())
        x = x + multiply(block.mlp.gelu(multiply(h, block.mlp.c_fc)), block.mlp.c_proj)
    return F.layer_norm(x[:, 0], x.shape[-1:], visual.ln_post.weight.double(), visual.ln_post.bias.double()).float()


def multiply(x: Tensor, linear: nn.Linear) -> Tensor:
    """Round x by token and W by output, multiply, scale back."""
    weight = linear.weight.double()
    token, output = x.abs().amax(-1, keepdim=True) / 127, weight.abs().amax(1, keepdim=True) / 127
    return ((x / token).round() @ (weight / output).round().T) * token * output.T + linear.bias.double()
