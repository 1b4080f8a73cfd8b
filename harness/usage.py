"""What `crucible COMMAND --help` shows below the options: examples, and how overrides are written."""

OVERRIDES = """\
Overrides are key=value; `crucible show` prints every key. MLflow's spelling, --key value, means the same.
  method=ties            a choice: a file of conf/method (likewise pool, tasks, experiment, debug)
  method.density=0.3     a value; lists are [a,b], nothing is null
  +pool.experts.x=PATH   a further entry of a mapping; ~pool.experts.x removes one
  experts=[a,b]          these of the pool's experts only, in this order
  pool=my/pool.yaml      a file of your own (likewise tasks, experiment)
"""

TOP = """\
examples:
  crucible run                                    merge and evaluate with the defaults
  crucible run method=ties method.density=0.3
  crucible evaluate expert=digits                 score one expert without merging
  crucible list methods
  crucible show method=dare
  crucible COMMAND --help
"""

RUN = """\
examples:
  crucible run method=ties method.density=0.3
  crucible run method=slerp experts=[digits,letters]
  crucible run pool=clip_vit_b32_ta8 tasks=clip_ta8 fabric.devices=2
  crucible run debug=batch                        one small batch on the CPU
  crucible run --from-run 3f2a... seed=1          repeat an earlier run, with another seed
"""

EVALUATE = """\
examples:
  crucible evaluate                               the base
  crucible evaluate expert=digits                 one expert (method=expert method.expert=digits)
  crucible evaluate model=path/to/model           a model in the pool's format: directory, models:/ or runs:/ URI
  crucible evaluate pool=clip_vit_b32_ta8 tasks=clip_ta8 expert=svhn
"""

MERGE = """\
examples:
  crucible merge pool=causal_lm pool.base=org/base +pool.experts.chat=org/chat +pool.experts.code=PATH \\
      method=ties method.density=0.3 output=merged
  crucible merge pool=mini_lm method=slerp experts=[code] output=merged engine.dtype=bfloat16
  crucible merge pool=mini_lm method=dare dry_run=true             look first: tensors, memory, disk, time
  crucible merge ... output=merged engine.resume=true              go on after an interruption
  crucible merge pool=mini_lm_lora output=adapter output_kind=adapter adapter.rank=8
"""

EXTRACT = """\
examples:
  crucible extract-lora --base org/base --tuned org/chat --rank 32 --output chat-lora
  crucible extract-lora --base PATH --tuned PATH --energy 0.9 --output DIR
"""

IMPORT = """\
examples:
  crucible import-mergekit recipe.yml                    print our configuration for it
  crucible import-mergekit recipe.yml --output my.yaml   and then: crucible merge experiment=my.yaml output=DIR
"""

STUDY = """\
`study.KEY=value` is of the study (conf/study/default.yaml has every key), the rest of the runs it makes; keys that a
run does not have may be given short, trials=50.
examples:
  crucible study method=ties trials=50 workers=2
  crucible study method=dare +study.space.method.density.low=0.3 study.repeats=3
  crucible study study.methods=[ties,dare,task_arithmetic] study.sampler=tpe
  crucible study method=task_arithmetic study.coefficients=expert study.sampler=cmaes
  crucible study method=ties study.name=mine study.resume=true   go on after Ctrl-C, kill -9 or a reboot
  crucible study study=studies/examples/NAME.yaml
"""

BENCHMARK = """\
Keys of its own: methods=all or [a,b], trials=30 for each, output=FILE.md (and FILE.json), name=benchmark: under the
name of one that was begun, what is finished is not repeated. `study.KEY=value` is of every study, the rest of the runs.
examples:
  crucible benchmark methods=all output=docs/benchmark.md
  crucible benchmark methods=[ties,dare] trials=10 study.workers=2
  crucible benchmark methods=all pool=clip_vit_b32_ta8 tasks=clip_ta8 name=clip
"""

FINETUNE = """\
`finetune.KEY=value` is of the training (conf/finetune/default.yaml has every key) and may be given short, task=digits;
the rest is of a run: its pool's base is trained, evaluation.split (here validation) is scored on the way.
examples:
  crucible finetune task=digits
  crucible finetune task=digits finetune=lora lora.rank=4
  crucible finetune pool=mini_lm tasks=mini_lm task=roman steps=400 output=roman_expert
  crucible finetune task=digits checkpoints=DIR resume=true        go on after an interruption
  crucible run +pool.experts.mine=runs:/ID/model                   merge the expert with others
"""

ANALYSE = """\
`analyse.KEY=value` is of the analysis (conf/analyse/default.yaml has every key) and may be given short; the rest is of
a run: losses are measured on evaluation.split, here validation.
examples:
  crucible analyse
  crucible analyse parts=[cosine,signs,norms,spectra] tasks=none pool=my/pool.yaml
  crucible analyse parts=[line] lines=[base:digits,digits:letters,base:sum] points=21
  crucible analyse parts=[plane] plane=[digits,letters] evaluation.split=test
"""

LIST = """\
examples:
  crucible list methods
  crucible list methods ties                      formula, source, parameters, cost
  crucible list pools
  crucible list tasks --config-dir my/conf
"""

SHOW = """\
examples:
  crucible show
  crucible show method=ties method.density=0.3
  crucible show --from-run 3f2a...
"""

BUILD = """\
examples:
  crucible build-suite                            rebuild the embedded base, experts and data in place
  crucible build-suite --output DIR --seed 1      build them somewhere else
  crucible build-suite --suite mini_lm            the language models
"""
