"""tools/library_tool.py: the libraries' own tools on our configs."""
import pickle
from pathlib import Path

import cv2
import pytest
import torch
from tiny import Trained, load_main, run_tool


def test_tools_are_listed(capsys: pytest.CaptureFixture) -> None:
    main = load_main('library_tool')
    for library, tool in (('mmpretrain', 'visualization/vis_cam'),
                          ('mmdet', 'analysis_tools/coco_error_analysis'),
                          ('mmseg', 'analysis_tools/benchmark')):
        assert main([library]) == 0
        assert tool in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize('args, message', [
    (['mmpose'], 'no library mmpose: choose one of mmpretrain, mmdet, mmseg'),
    (['mmdet', 'analyse_logs'], 'did you mean analysis_tools/analyze_logs'),
    (['mmdet', 'browse_dataset'], 'mmdet has several browse_dataset'),
    (['mmdet', 'benchmark', 'x.py', '--task', 'inference'], 'benchmark'),
])
def test_refused(capsys: pytest.CaptureFixture, args: list[str], message: str) -> None:
    if args[-1] == 'inference' and torch.cuda.is_available():
        pytest.skip('it runs here')
    assert load_main('library_tool')(args) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and message in error and len(error.splitlines()) == 1


@pytest.mark.parametrize('library', ['mmpretrain', 'mmdet'])
def test_log_curves(library: str, trained, tmp_path: Path) -> None:
    run: Trained = trained('mmpretrain')
    log, = run.work_dir.glob('*/vis_data/scalars.json')
    out = tmp_path / 'loss.png'
    done = run_tool('library_tool', library, 'analyze_logs', 'plot_curve', log, '--keys', 'loss',
                    '--out', out)
    assert done.returncode == 0, done.stderr
    assert cv2.imread(str(out)) is not None


def test_checkpoint_reading_is_in_force(trained, tmp_path: Path) -> None:
    run: Trained = trained('mmseg')
    state = torch.load(run.checkpoint, weights_only=False)['state_dict']
    state.pop('backbone.stages.0.blocks.0.norm.bias')
    torch.save(dict(state_dict=state), tmp_path / 'lacking.pth')
    refused = run_tool('library_tool', 'mmseg', 'benchmark', run.config, tmp_path / 'lacking.pth',
                       '--work-dir', tmp_path)
    assert refused.returncode == 2
    assert '1 missing: backbone.stages.0.blocks.0.norm.bias' in refused.stderr


def test_confusion_matrix_of_a_segmenter(trained, tmp_path: Path) -> None:
    """mmseg's tool knows no classes that only a config names, unmended."""
    run: Trained = trained('mmseg')
    done = run_tool('test', run.config, run.checkpoint, '--work-dir', tmp_path, '--cfg-options',
                    f'test_evaluator.output_dir={tmp_path / "maps"}')
    assert done.returncode == 0, done.stderr
    done = run_tool('library_tool', 'mmseg', 'confusion_matrix', run.config, tmp_path / 'maps',
                    tmp_path / 'confusion')
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'confusion/confusion_matrix.png').stat().st_size > 10_000


def test_confusion_matrix_of_a_classifier(trained, tmp_path: Path) -> None:
    run: Trained = trained('mmpretrain')
    done = run_tool('library_tool', 'mmpretrain', 'confusion_matrix', run.config, run.checkpoint,
                    '--show-path', tmp_path / 'matrix.png', '--out', tmp_path / 'matrix.pkl')
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'matrix.png').is_file()
    matrix = pickle.loads((tmp_path / 'matrix.pkl').read_bytes())
    assert matrix.shape == (2, 2) and matrix.sum(1).tolist() == [4, 4]
