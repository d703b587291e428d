# For hosts with NVIDIA GPUs. torch's wheels bring CUDA's libraries, so of the host only the driver is needed, and Docker's
# toolkit for NVIDIA (on one without GPUs, leave --gpus out and add --num_gpus for the CPU ranks, before the program).
#
#   docker build -t megatrain .
#   docker run --gpus all --ipc host -v "$PWD:/workspace" megatrain launch/pretrain.py --config /workspace/run.yaml
#
# Arguments go to the deepspeed launcher. Paths in run.yaml are those inside the container: keep data and runs in /workspace.
FROM python:3.12-slim

# torch.compile and Triton build small programs while they run
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

WORKDIR /megatrain
COPY requirements.lock .
RUN pip install --no-cache-dir "$(grep '^torch==' requirements.lock)" \
    && pip install --no-cache-dir -r requirements.lock
COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation -e .

ENTRYPOINT ["deepspeed"]
CMD ["launch/pretrain.py", "--help"]
