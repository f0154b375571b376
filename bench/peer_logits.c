// The peer's logits as an oracle: float32 [n_token, n_vocab] of one prompt, from llama.cpp's own library.
//
// Build beside a llama.cpp tree (SRC) and its libraries (BIN):
//   cc -O2 -ISRC/include -ISRC/ggml/include bench/peer_logits.c -o peer_logits -LBIN -lllama -lggml -lggml-base -Wl,-rpath,BIN
// Use: peer_logits MODEL.gguf 1,2,3 OUT.f32
#include <llama.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void quiet(enum ggml_log_level level, const char *text, void *user) {
    (void)user;
    if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
}

int main(int argc, char **argv) {
    if (argc != 4) {
        fprintf(stderr, "usage: %s MODEL.gguf 1,2,3 OUT.f32\n", argv[0]);
        return 2;
    }
    llama_log_set(quiet, NULL);
    static llama_token ids[4096];
    int n = 0;
    for (char *piece = strtok(argv[2], ","); piece && n < 4096; piece = strtok(NULL, ",")) ids[n++] = atoi(piece);

    struct llama_model_params mp = llama_model_default_params();
    mp.n_gpu_layers = 0;
    struct llama_model *model = llama_model_load_from_file(argv[1], mp);
    if (!model) return 1;
    struct llama_context_params cp = llama_context_default_params();
    cp.n_ctx = 4096;
    cp.n_batch = 4096;
    cp.n_threads = cp.n_threads_batch = 2;
    struct llama_context *ctx = llama_init_from_model(model, cp);
    if (!ctx) return 1;

    struct llama_batch batch = llama_batch_init(n, 0, 1);
    batch.n_tokens = n;
    for (int i = 0; i < n; i++) {
        batch.token[i] = ids[i];
        batch.pos[i] = i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i] = 1;
    }
    if (llama_decode(ctx, batch)) return 1;

    FILE *out = fopen(argv[3], "wb");
    if (!out) return 1;
    size_t n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    for (int i = 0; i < n; i++) fwrite(llama_get_logits_ith(ctx, i), sizeof(float), n_vocab, out);
    return fclose(out) ? 1 : 0;
}
