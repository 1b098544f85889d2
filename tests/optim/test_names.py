"""Names of the parameters of public JAX and PyTorch code bases."""

import pytest

from jaxpapers.optim.names import in_block, read_name

NAMES = {
    "head": """
        lm_head/kernel model/lm_head/weight lm_head.weight lm_head_kernel LMHead_0/kernel
        head/0/weight head/Dense_0/kernel decoder/logits_dense/kernel
        decoder/logitdense/kernel to_logits/weight unembed unembedding/kernel unembed/W_U
        W_U classifier/kernel classifier/out_proj/weight classifier_head/kernel
        cls_head/kernel policy_head/kernel q_head/linear/w action_heads/1/kernel
        score/kernel output/kernel output_layer/kernel decoder/output_layer/kernel
        decoder_output out/kernel model/out/kernel vocab_projection/kernel
        vocab_proj/kernel embed_out/kernel output_embedding/weight readout/w
        cls/predictions/decoder/kernel qa_outputs/kernel vocab_projector/kernel
        cls/seq_relationship/kernel discriminator_predictions/dense_prediction/kernel
        proj_out/kernel fc_out/kernel model/out_proj/weight softmax/kernel softmax_w
        head_linear/w lm_proj/kernel final_layer/linear/kernel
    """,
    "embedding": """
        transformer/wte/embedding transformer/wpe/embedding model.embed_tokens.weight
        token_embedder/embedding position_embedder/embedding decoder/Embed_0/embedding
        shared/embedding embed/embedding embed/w transformer/embed/embeddings
        embeddings/token_embeddings/weight tok_emb/weight pos_emb/weight emb posemb
        tok_embeddings/weight pos_embedding W_E pos_embed/W_pos tokens position
        embedder/input_embedding item_table/table tables/item position_ids_table
        patch_embed/proj/kernel embed_positions/kernel vocab_embedding/weight
        relative_attention_bias/embedding value_embeds/0/weight embed/kernel/value
        cls_token register_tokens prompt_tokens MAPHead_0/probe latents codebook
        quantizer/codevectors pos_enc/weight positional_encoding learned_pos
    """,
    "scalar": """
        decoder/decoder_norm/scale layers/pre_self_attention_layer_norm/scale
        layers/ln_1/weight ln_f/weight norm1/weight layers/rms_1/g model/norm/kernel
        model.layers.3.input_layernorm.weight LayerNorm_0/scale RMSNorm_2/weight
        BatchNorm_0/scale blocks/LayerScale/gamma layers/alpha q_norm/weight attn_norm
        layers/mlp/wi/bias layers/b mlp/~/linear_0/b attn/b_Q mlp/b_in logits/bias
        layers/mlp/bias/value layer_norm/offset norm_f/weight
        LayerNormalization_0/weight normalization/weight layernorm_embedding/weight
        layers/mixer/A_log
    """,
    "": """
        blocks/0/attn/query/kernel attn/value/kernel attn/value
        transformer/h0_attn/linear/w mlp/~/linear_0/w decoder/layers/mlp/wi_0/kernel
        blocks/0/mlp/fc1/weight layers_0/lora_a layers_0/lora_b layers/0/lora_B A B
        router/kernel moe/gate/kernel lora/a lora/b vocab_transform/kernel
        encoderblock_0/out_proj/kernel transformer_blocks/0/proj_out/weight
        cls/predictions/transform/dense/kernel linear_pos/kernel encoding_mlp/kernel
        gate_logits/kernel router_logits/kernel attn/W_Q mlp/W_in
        abnormality_detector/kernel normalizer_net/kernel bias_correction_mlp/kernel
        headless_mlp/kernel overhead/kernel member_proj/kernel embedder_mlp/hidden/kernel
        EmbedderBlock/proj/kernel t_embedder/mlp/0/kernel time_embedding/Dense_0/kernel
        text_embedder/layers_0/attn/kernel embedding_projection/kernel
        NormFormer_0/Dense_0/kernel pre_norm_block/attn/query/kernel
        adaln_norm/linear/kernel layer_norm_mlp/kernel scale_proj/kernel
        multi_head/out/kernel attn/head/kernel MultiHeadDotProductAttention_0/out/kernel
        self_attention/output/kernel encoder/layer/0/output/dense/kernel
        vit/pre_logits/kernel image_classifier_mlp/kernel score_network/Dense_0/kernel
        token_mixing/Dense_0/kernel output_gate/kernel pooler/dense/kernel
    """,
}


@pytest.mark.parametrize("group", NAMES)
def test_names_of_public_code(group):
    wrong = {p: read_name(p) for p in NAMES[group].split() if read_name(p)[0] != group}
    assert not wrong


def test_only_embeddings_of_tokens_count_the_vocabulary():
    tokens = ["wte/embedding", "tok_emb/weight", "shared/embedding", "W_E"]
    others = ["wpe/embedding", "pos_emb/weight", "time_embed/kernel", "W_pos", "posemb"]
    assert [read_name(p).tokens for p in tokens] == [True] * 4
    assert [read_name(p).tokens for p in others] == [False] * 5


def test_a_word_of_a_name_is_whole_and_says_where():
    assert read_name("decoder/Logits_Dense_3/kernel")[:2] == ("head", "Logits_Dense_3")
    assert read_name("x/RMSNorm_0/weight")[:2] == ("scalar", "RMSNorm_0")
    assert in_block("layers/3/up/kernel") and not in_block("decoder/final/kernel")
