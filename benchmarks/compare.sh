#!/usr/bin/env bash
# The two comparisons of docs/benchmarks.md: benchmarks/compare.sh drm|verifier OUT.  They resume in a folder that they find.
set -euo pipefail
cd "$(dirname "$0")/.."
best="transition=cps 0.9:returned=best"  # particles that maximise
case "${1:-}" in
  drm)
    samplers="none:transition=cps 0.9,none:transition=ode,best-of-n:transition=cps 0.9,stepwise,stepwise:trajectories=2"
    samplers+=",svdd:block=2,rbf,funnel,fk-steering:$best,smc:temperature=0.1:returned=best"
    samplers+=",smc:temperature=0.1:$best,reward-gradient"
    samplers+=",reward-gradient:push=noise:strength=0.4,tree-search,noise-search:mode=paths,backtracking,lidar,noise-search"
    samplers+=",noise-search:transition=cps 0.9,demon,tree-sampling:temperature=0.1:transition=cps 0.9,psi:temperature=0.1:$best,noise-optimization"
    # of 192 samples of training captions .73 score above 0.5, and .965 of these are right (.80 of all)
    samplers+=",best-of-n:transition=cps 0.9:accept=0.5,tree-search:batch=1:accept=0.5"
    judges=(--guide shapes-drm --monitor shapes-correct,shapes-verifier) ;;
  verifier)
    samplers="none:transition=cps 0.9,best-of-n:transition=cps 0.9,stepwise,funnel,tree-search,fk-steering:temperature=0.1:$best"
    samplers+=",noise-search:mode=paths,backtracking,svdd:block=2,rbf,demon,noise-search,lidar"
    samplers+=",noise-search:transition=cps 0.9"
    samplers+=",tree-sampling:temperature=0.05:transition=cps 0.9,psi:temperature=0.1:$best,noise-optimization:gradient=zeroth-order"
    samplers+=",best-of-n:transition=cps 0.9:accept=1,tree-search:batch=1:accept=1"
    judges=(--guide shapes-verifier --monitor shapes-correct,shapes-drm) ;;
  *) echo "usage: $0 drm|verifier OUT" >&2; exit 2 ;;
esac
exec rsm-guidance compare --prompts benchmarks/captions.txt --samplers "$samplers" --budgets 42,84,168 --steps 10 \
  "${judges[@]}" --pairs 16 --batch-size 32 --autocast --out "${2:?give a folder for the report}"
