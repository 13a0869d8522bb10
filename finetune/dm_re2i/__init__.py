"""DM-RE2I: EVRNet and the EEG-guided DDPM (doi 10.1016/j.bspc.2023.105125)."""

from finetune.papers import Paper

PAPER = Paper(
    command="ddpm",
    help="train EVRNet, then the EEG-guided DDPM",
    module="finetune.dm_re2i.train",
    kind="eg_ddpm",
    generator="finetune.dm_re2i.model:DMRE2IGenerator",
)
