"""diffusers' common pipeline tests, restated for reward-guided classes on the tiny pipelines of `tests/zoo/`.

Upstream these are mixins (tests/pipelines/test_pipelines_common.py and, since 0.40, tests/pipelines/testing_utils/) that
are in no package.  Here each is proven anew, and three ways at once: the stock class, our class without a sampler, and
our class with the sampler `none` give the same bits (`thrice`).  What stands behind each upstream test:

PipelineTesterMixin
  test_save_load_local                              restated; in both directions between our class and the stock one
  test_pipeline_call_signature                      restated, with our arguments
  test_inference_batch_consistent                   restated
  test_inference_batch_single_identical             restated; by seed in test_conformity.py
  test_dict_tuple_outputs_equivalent                restated
  test_components_function                          restated
  test_float16_inference                            restated on the CPU; in bfloat16 in test_behaviour.py
  test_save_load_float16                            restated on the CPU
  test_save_load_optional_components                restated
  test_to_device                                    to the CPU only; to another device it needs an accelerator
  test_to_dtype                                     restated
  test_attention_slicing_forward_pass               restated where the denoiser can slice
  test_xformers_attention_forwardGenerator_pass     not applicable: xformers needs a GPU
  test_num_images_per_prompt                        restated
  test_cfg                                          restated
  test_callback_inputs                              restated
  test_callback_cfg                                 restated
  test_serialization_with_variants                  restated
  test_loading_with_variants                        restated, in the same test
  test_loading_with_incorrect_variants_raises_error restated, in the same test
  test_encode_prompt_works_in_isolation             restated without a sampler; with one, embeddings are refused
  test_StableDiffusionMixin_component               restated with slicing and tiling
  test_torch_dtype_dict                             restated
  test_save_load_dduf                               restated as a refusal: diffusers 0.42 no longer reads these files
PipelineOffloadTesterMixin, GroupOffloadTesterMixin, LayerwiseCastingTesterMixin
  test_sequential_cpu_offload_forward_pass, test_sequential_offload_forward_pass_twice
                                                    need an accelerator: the stock call fails with the CPU as the device
  test_model_cpu_offload_forward_pass, test_cpu_offload_forward_pass_twice,
  test_group_offloading_inference, test_pipeline_level_group_offloading_inference,
  test_pipeline_level_group_offloading_sanity_checks
                                                    restated with the CPU as the device: hooks run, nothing moves
  test_pipeline_with_accelerator_device_map         restated with the map "cpu"
  test_layerwise_casting_inference                  restated
PipelineLatentTesterMixin
  test_pt_np_pil_outputs_equivalent                 restated
  test_pt_np_pil_inputs_equivalent                  restated
  test_latents_input                                restated, for input images and for `latents`
  test_multi_vae                                    restated, without the consistency decoder, which is a pipeline itself
PipelineFromPipeTesterMixin
  test_from_pipe_consistent_config                  restated, in both directions and between tasks
  test_from_pipe_consistent_forward_pass            restated, in both directions and between tasks
  test_from_pipe_consistent_forward_pass_cpu_offload  restated with the CPU as the device
SDFunctionTesterMixin
  test_vae_slicing, test_vae_tiling                 restated
  test_freeu                                        restated
  test_fused_qkv_projections                        restated
PipelineKarrasSchedulerTesterMixin
  test_karras_schedulers_shape                      restated bit for bit; with our transitions in test_behaviour.py;
                                                    DPMSolverSDEScheduler needs torchsde
IPAdapterTesterMixin, FluxIPAdapterTesterMixin
  test_pipeline_signature                           by test_pipeline_call_signature: ours is stock's and more
  test_ip_adapter, test_ip_adapter_cfg, test_ip_adapter_masks  restated for Stable Diffusion, whose zoo has an adapter
  test_ip_adapter_faceid, and those of Flux         not restated: other adapter weights through the same stock code
PyramidAttentionBroadcastTesterMixin, FasterCacheTesterMixin, FirstBlockCacheTesterMixin, TaylorSeerCacheTesterMixin,
MagCacheTesterMixin
  test_pyramid_attention_broadcast_inference, test_first_block_cache_inference, test_taylorseer_cache_inference,
  test_mag_cache_inference                          restated
  test_pyramid_attention_broadcast_layers, test_faster_cache_state, test_faster_cache_basic_warning_or_errors_raised
                                                    not applicable: they look into hooks of diffusers' models
  test_faster_cache_inference                       not restated: it fails in the stock call on models this small
LoraTesterMixin, UNetLoraTesterMixin, LoraMemoryTesterMixin
  test_simple_inference_with_text_denoiser_lora_save_load, test_lora_fuse_unfuse, test_lora_scale_kwargs_match_fusion,
  test_simple_inference_with_text_denoiser_multi_adapter, ..._multi_adapter_weighted, ..._multi_adapter_delete_adapter,
  test_simple_inference_with_text_denoiser_lora_unloaded, test_get_list_adapters
                                                    restated, in one test
  test_simple_inference_with_text_denoiser_lora_and_scale  test_lora_and_its_scale in test_behaviour.py
  the others                                        not applicable: metadata, messages and key formats of LoRA files,
                                                    text encoders under LoRA, which are encoded by stock code, and
                                                    group offloading of LoRA, which needs an accelerator
PipelinePushToHubTester
  test_push_to_hub, test_push_to_hub_in_organization, test_push_to_hub_library_name
                                                    need the network; save_pretrained is stock's own
testing_utils/quantization.py                       not applicable: bitsandbytes, torchao, modelopt, and an accelerator
"""
