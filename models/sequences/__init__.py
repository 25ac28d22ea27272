"""Architectures of long histories: LONGER and ADS in front of a backbone, HyFormer and MixFormer as whole rankers."""
