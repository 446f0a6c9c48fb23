"""Written clips, read again."""
import io

from timm_ssm.data import Video
from timm_ssm.data.encode import write_clip

from .videos import numbered_frame, read_numbers


def test_frames_of_a_path(tmp_path):
    """From a generator, of frames that are parts of others."""
    write_clip(tmp_path / 'clip.mp4', (numbered_frame(i, width=104)[:, :96] for i in range(5)), rate=10)
    video = Video(str(tmp_path / 'clip.mp4'))
    assert (video.num_frames, video.fps) == (5, 10) and read_numbers(video.read(range(5))) == list(range(5))


def test_options_reach_the_encoder():
    """x264 writes them into the stream."""
    file = io.BytesIO()
    write_clip(file, [numbered_frame(0)], rate=10, crf='40', threads='1')
    assert b' crf=40.0 ' in file.getvalue() and b' threads=1 ' in file.getvalue()
