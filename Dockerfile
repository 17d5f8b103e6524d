# For CPUs, or for other devices by an extra of setup.cfg:
#   docker build -t vit_jax_zoo .
#   docker build -t vit_jax_zoo:cuda --build-arg EXTRA=cuda .
#   docker build -t vit_jax_zoo:tpu --build-arg EXTRA=tpu .
# The demo, then a prediction with it; GPUs also need --gpus=all, TPUs --privileged --net=host:
#   docker run --rm -v "$PWD/runs:/app/runs" vit_jax_zoo
#   docker run --rm -v "$PWD:/app/data" -v "$PWD/runs:/app/runs" vit_jax_zoo \
#     vit_jax_zoo.predict --model=runs/vit_demo --images=data/a.jpg --output=data/out
FROM python:3.12-slim

ARG EXTRA=fast
WORKDIR /app
COPY setup.cfg setup.py pyproject.toml README.md LICENSE ./
COPY vit_jax_zoo vit_jax_zoo
COPY configs configs
RUN pip install --no-cache-dir -e ".[${EXTRA}]" && python -m compileall -q vit_jax_zoo configs

ENTRYPOINT ["python", "-m"]
CMD ["vit_jax_zoo.main", "--config=configs/vit.py"]
