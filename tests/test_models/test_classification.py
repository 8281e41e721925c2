import copy

import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import DefaultScope
from mmpretrain.structures import DataSample

import mmgroupmamba.models.classification  # noqa: F401
from mmgroupmamba.checkpoint import CheckpointError, from_official
from mmgroupmamba.models.groupmamba import ARCHS
from mmgroupmamba.registry import MODELS

MICRO = dict(
    stem_hidden_dim=8, embed_dims=(16, 16, 32, 32), depths=(1, 1, 1, 1), mlp_ratios=(2, 2, 2, 2))
PREPROCESSOR = dict(
    mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True, num_classes=5)


@pytest.fixture(autouse=True)
def scope():
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        yield


def student(arch=MICRO, num_classes=5, mlp_ratio=4, **kwargs):
    channels = arch['embed_dims'][-1]
    return copy.deepcopy(dict(
        type='ImageClassifier',
        backbone=dict(
            type='mmgroupmamba.GroupMamba', arch=arch, out_indices=(3, ), final_norm=False),
        neck=dict(type='mmgroupmamba.ClassBlockNeck', embed_dim=channels, mlp_ratio=mlp_ratio),
        head=dict(type='mmgroupmamba.DistilledLinearHead', num_classes=num_classes,
                  in_channels=channels, **kwargs),
        data_preprocessor=PREPROCESSOR))


def distilled(teacher=None, **kwargs):
    return MODELS.build({
        **student(), 'type': 'mmgroupmamba.DistilledImageClassifier',
        'teacher': teacher or student(), **kwargs
    })


def samples(count=4, mixed=False):
    if mixed:
        return [DataSample().set_gt_score(torch.rand(5).softmax(0)) for _ in range(count)]
    return [DataSample().set_gt_label(i % 5) for i in range(count)]


def relative(got, want):
    return ((got - want).abs().max() / want.abs().max()).item()


@pytest.mark.parametrize('case', [0, 1])
def test_logits_equal_the_official(golden, case):
    model = MODELS.build(student(golden['arch'], golden['num_classes'], mlp_ratio=2)).eval()
    state = from_official(golden['state_dict'], (
        k[len('backbone.'):] if k.startswith('backbone.') else k for k in model.state_dict()))
    model.load_state_dict({
        (k if k.startswith(('neck.', 'head.')) else f'backbone.{k}'): v for k, v in state.items()})
    case = golden['cases'][case]
    with torch.no_grad():
        score, dist_score = model.head.logits(model.extract_feat(case['input']))
        averaged = model(case['input'])
    assert relative(score, case['head_logits']) < 1e-5
    assert relative(dist_score, case['dist_head_logits']) < 1e-5
    assert relative(averaged, case['eval_logits']) < 1e-5


@pytest.mark.parametrize('mixed', [False, True])
@pytest.mark.parametrize('alpha', [0., 0.3, 0.5, 1.])
def test_hard_distillation_is_equation_10(alpha, mixed):
    torch.manual_seed(0)
    model = distilled(alpha=alpha)
    inputs, data = torch.randn(4, 3, 64, 64), samples(mixed=mixed)
    losses = model.loss(inputs, data)

    with torch.no_grad():
        labels = model.teacher.model.eval()(inputs).argmax(1)
        score, dist_score = model.head.logits(model.extract_feat(inputs))
        if mixed:
            targets = torch.stack([d.gt_score for d in data])
            cls = -(targets * score.log_softmax(1)).sum(1).mean()
        else:
            cls = -score.log_softmax(1)[torch.arange(4), [0, 1, 2, 3]].mean()
        distill = -dist_score.log_softmax(1)[torch.arange(4), labels].mean()
    # BatchNorm in train mode makes both passes see the same batch statistics
    torch.testing.assert_close(losses['loss_cls'].detach(), (1 - alpha) * cls)
    torch.testing.assert_close(losses['loss_distill'].detach(), alpha * distill)
    total, _ = model.parse_losses(losses)
    torch.testing.assert_close(total.detach(), (1 - alpha) * cls + alpha * distill)


def test_soft_distillation():
    torch.manual_seed(0)
    model = distilled(distillation='soft', tau=3.)
    inputs = torch.randn(4, 3, 64, 64)
    loss = model.loss(inputs, samples())['loss_distill'].detach()
    with torch.no_grad():
        teacher = (model.teacher(inputs) / 3).softmax(1)
        own = (model.head.logits(model.extract_feat(inputs))[1] / 3).softmax(1)
        want = 0.5 * 9 * (teacher * (teacher / own).log()).sum() / 20
    torch.testing.assert_close(loss, want)


def test_teacher_is_frozen_and_nowhere_in_the_student():
    model = distilled()
    model.train()
    assert not any('teacher' in k for k in model.state_dict())
    assert not any('teacher' in k for k, _ in model.named_parameters())
    assert not model.teacher.model.training
    assert not any(p.requires_grad for p in model.teacher.model.parameters())
    assert copy.deepcopy(model).teacher is model.teacher  # as EMA copies it
    before = {k: v.clone() for k, v in model.teacher.model.state_dict().items()}
    loss, _ = model.parse_losses(model.loss(torch.randn(4, 3, 64, 64), samples()))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.teacher.model.state_dict().items())


def test_two_heads_without_a_teacher_train_as_one():
    model = MODELS.build(student())
    inputs = torch.randn(4, 3, 64, 64)
    loss = model.loss(inputs, samples())['loss']
    torch.testing.assert_close(loss, F.cross_entropy(model(inputs), torch.arange(4)))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize('kwargs, message', [
    (dict(alpha=1.5), r'alpha must be in \[0, 1\], got 1.5'),
    (dict(distillation='medium'), "'hard' or 'soft', got 'medium'"),
    (dict(tau=0), 'tau must be positive'),
    (dict(head=dict(type='LinearClsHead', num_classes=5, in_channels=32)),
     'mmgroupmamba.DistilledLinearHead.*got LinearClsHead'),
])
def test_bad_argument_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        distilled(**kwargs)


def test_teacher_of_another_normalisation():
    teacher = {**student(), 'data_preprocessor': dict(mean=[0.] * 3, std=[1.] * 3)}
    with pytest.raises(ValueError, match='the teacher wants images normalised'):
        distilled(teacher).init_weights()


def test_teacher_is_built_for_training_only():
    model = distilled(dict(type='TimmClassifier', model_name='no such model'))
    model.eval()
    assert len(model.predict(torch.randn(2, 3, 64, 64))) == 2


def test_teacher_takes_its_weights(tmp_path):
    source = MODELS.build(student())
    path = str(tmp_path / 'teacher.pth')
    torch.save({'state_dict': source.state_dict()}, path)
    model = distilled({**student(), 'init_cfg': dict(type='Pretrained', checkpoint=path)})
    model.init_weights()
    got = model.teacher.model.state_dict()
    assert all(torch.equal(v, got[k]) for k, v in source.state_dict().items())


def test_teacher_with_other_classes():
    teacher = student(num_classes=7)
    with pytest.raises(ValueError, match='teacher has 7 classes, the student 5'):
        distilled(teacher).loss(torch.randn(2, 3, 64, 64), samples(2))
    with pytest.raises(ValueError, match='teacher has 7 classes, the student 5'):
        distilled(teacher).init_weights()


def test_teacher_of_an_unfit_file(tmp_path):
    """mmengine's own init_cfg would load what matches and say little about the rest."""
    state = MODELS.build(student()).state_dict()
    state.pop('neck.norm.weight')
    path = str(tmp_path / 'teacher.pth')
    torch.save({'state_dict': state}, path)
    model = distilled({**student(), 'init_cfg': dict(type='Pretrained', checkpoint=path)})
    with pytest.raises(CheckpointError, match='missing: neck.norm.weight'):
        model.init_weights()


def test_teacher_of_another_size():
    model = distilled()
    model.teacher.model.model = torch.nn.Identity()
    model.teacher.model.model.default_cfg = dict(input_size=(3, 224, 224))
    with pytest.raises(ValueError, match=r'teacher takes images of \(224, 224\)'):
        model.loss(torch.randn(2, 3, 64, 64), samples(2))


def test_nano_trained_by_a_nano_teacher():
    """At every step of a training both terms are those of equation 10, computed by hand."""
    torch.manual_seed(0)
    nano = ARCHS['nano']
    model = distilled(student(nano), **{k: student(nano)[k] for k in ('backbone', 'neck', 'head')})
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    inputs = torch.randn(8, 3, 64, 64)
    targets = torch.rand(8, 5).softmax(1)
    data = [DataSample().set_gt_score(target) for target in targets]
    totals = []
    for _ in range(8):
        with torch.no_grad():
            token = model.neck(model.backbone(inputs))[0]
            fc, dist_fc = (token @ layer.weight.T + layer.bias
                           for layer in (model.head.fc, model.head.dist_fc))
            labels = model.teacher.model(inputs).argmax(1)
            cls = -(targets * fc.log_softmax(1)).sum(1).mean()
            distill = -dist_fc.log_softmax(1)[torch.arange(8), labels].mean()
        losses = model.loss(inputs, data)
        torch.testing.assert_close(losses['loss_cls'].detach(), 0.5 * cls)
        torch.testing.assert_close(losses['loss_distill'].detach(), 0.5 * distill)
        total, _ = model.parse_losses(losses)
        torch.testing.assert_close(total.detach(), 0.5 * (cls + distill))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < totals[0]
