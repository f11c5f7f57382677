#!/usr/bin/env bash
# Puts nvcc into a manylinux_2_28 image, for [tool.cibuildwheel] of pyproject.toml. FASTOPT_CUDA as
# in setup.py: a wheel that was built without nvcc has the CPU kernels, and Triton serves the cards.
set -euo pipefail
if [ "${FASTOPT_CUDA:-auto}" = off ]; then
  exit
fi
# NVIDIA's name of 64-bit Arm servers.
arch="$(uname -m | sed s/aarch64/sbsa/)"
{
  dnf install -y dnf-plugins-core &&
    dnf config-manager --add-repo \
      "https://developer.download.nvidia.com/compute/cuda/repos/rhel8/$arch/cuda-rhel8.repo" &&
    dnf install -y cuda-nvcc-13-0 cuda-cudart-devel-13-0 cuda-cccl-13-0
} || [ "${FASTOPT_CUDA:-auto}" = auto ]
