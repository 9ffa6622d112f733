# What is to be measured on a GPU, within an hour: bash tests/gpu.sh OUT
set -exo pipefail
code=$PWD out=${1:-runs/gpu}
mkdir -p "$out" && cd "$out"
python "$code/tests/benchmark.py" gpu | tee benchmark.txt
time python "$code/train_ldm.py"                     # everything from nothing, as the README says
python "$code/evaluate.py" quality | tee quality.txt
python "$code/evaluate.py" disentangle --study models --confounding 0.9 --train_steps 5000 \
    | tee disentangle.txt
plates=$code/plates/index.csv
if [ -f "$plates" ]; then                            # LINCS, see assets/results.md
    python "$code/train_vae.py" --data "$plates" --binning 2 --crop 64 --kl_weight 0.001 \
        --out runs/lincs_vae
    python "$code/train_ldm.py" --data "$plates" --vae runs/lincs_vae/model.pt --out runs/lincs \
        --biology smiles dose --experiment plate:category --views 100 --steps 2500 --uniform 0.2
fi
find . -name '*.txt' -o -name '*.json*' -o -name '*.png'  # small: these are worth keeping
