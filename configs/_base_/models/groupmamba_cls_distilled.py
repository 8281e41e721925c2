# The official model: two linear classifiers, the second one taught by RegNetY-16G.
_base_ = './groupmamba_cls.py'

model = dict(
    type='mmgroupmamba.DistilledImageClassifier',
    head=dict(type='mmgroupmamba.DistilledLinearHead'),
    # equation 10 (P, R): 0.5 softCE(head, mixed target) + 0.5 CE(dist_head, arg max of teacher)
    distillation='hard',
    alpha=0.5,
    teacher=dict(
        type='mmpretrain.TimmClassifier',
        model_name='regnety_160.deit_in1k',
        pretrained=True,
        data_preprocessor=dict(
            num_classes=1000,
            mean=[123.675, 116.28, 103.53],
            std=[58.395, 57.12, 57.375],
            to_rgb=True)))
