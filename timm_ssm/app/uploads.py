"""Uploads: what they are, told from their content, and whether they are small enough to be opened."""
import av
from PIL import Image, UnidentifiedImageError

MAX_BYTES = 64 * 2 ** 20
MAX_PIXELS = 40_000_000  # of an image, or of a frame
MAX_FRAMES = 10_000
IMAGES = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF')
#: FFmpeg's names of containers. It would also open playlists, which make it read other files and addresses.
CLIPS = 'mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,ogg,gif'


def kind_of(path: str, name: str) -> str:
    """Whether an upload is an 'image' or a 'video', from its first bytes; nothing is decoded.

    Args:
        path: The file.
        name: What to call it in errors.

    Raises:
        ValueError: It is neither, or too large.
    """
    kind, pixels, frames = _image(path) or _clip(path) or ('', 0, 0)
    if not kind:
        raise ValueError(
            f'{name} is neither an image nor a clip that can be read here; needs JPEG, PNG, WebP, GIF, BMP or TIFF, '
            'or MP4, WebM, MKV, MOV, AVI, MPEG or OGG')
    if pixels > MAX_PIXELS:
        raise ValueError(f'{name} has {pixels / 1e6:.0f} million pixels, needs at most {MAX_PIXELS / 1e6:.0f}')
    if frames > MAX_FRAMES:
        raise ValueError(f'{name} has more than {MAX_FRAMES:,} frames, needs at most that many')
    return kind


def _image(path: str):
    try:
        with Image.open(path, formats=IMAGES) as image:
            if image.format == 'GIF' and image.is_animated:
                return None  # a clip
            return 'image', image.width * image.height, 1
    except Image.DecompressionBombError:
        return 'image', float('inf'), 1
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):  # the latter from damaged headers
        return None


def _clip(path: str):
    try:
        with av.open(path, options=dict(format_whitelist=CLIPS, protocol_whitelist='file')) as container:
            stream = container.streams.best('video')
            if stream is None:
                return None
            packets = sum(1 for _, packet in zip(range(MAX_FRAMES + 2), container.demux(stream)) if packet.size)
            return 'video', stream.width * stream.height, packets
    except (av.FFmpegError, OSError, ValueError):
        return None
