"""Synthetic images with two independent labels, shape and texture: the demo's runs.

    clvsmim train --config=configs/shape_texture.py:moco_v3 --workdir=runs/shapes_cl
    clvsmim train --config=configs/shape_texture.py:simmim  --workdir=runs/shapes_mim
    clvsmim train --config=configs/shape_texture.py:hybrid  --workdir=runs/shapes_mix

The question behind it: does an encoder that learned without labels tell shapes or
textures apart? About a minute each on two CPU cores; everything but the images is that
of demo.py. No published result.
"""

from ml_collections import ConfigDict

from clvsmim.configs import demo


def get_config(name: str = "hybrid") -> ConfigDict:
    """The run `name`: moco_v3, simmim or hybrid."""
    config = demo.get_config(name)
    config.data.source = ConfigDict(
        dict(name="shape_texture", length=4096, side=48, label="shape")
    )
    return config
