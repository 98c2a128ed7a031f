"""Images as uint8 tensors: shipped digits and faces, torchvision names, MedMNIST-style .npz files, folders of images.

Every source becomes the same four arrays, passes the same checks and is handed out as one `Dataset` in memory.
Whatever a user can get wrong is a `ValueError` of one line that names the file or argument, what it held and what was
expected.
"""

from raytrust.data.dataset import Dataset
from raytrust.data.load import load

__all__ = ["Dataset", "load"]
