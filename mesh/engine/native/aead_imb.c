/* ChaCha20-Poly1305 and AES-256-GCM of the Intel Multi-Buffer Crypto library, for CPUs with AVX-512, IFMA and VAES.
 *
 * The layout of jobs, managers and schedules belongs to a version of the library, so it is its header that is asked, not
 * a copy of it. */
#include <intel-ipsec-mb.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define WANTED (IMB_CPUFLAGS_AVX512_T2 | IMB_FEATURE_SAFE_DATA | IMB_FEATURE_SELF_TEST_PASS)

/* A manager, or NULL: this CPU gains nothing, the library does not clear what it touched, or its self-test failed. */
void *retinue_imb_new(void)
{
    IMB_MGR *manager = alloc_mb_mgr(0);
    if (manager == NULL)
        return NULL;
    if ((manager->features & IMB_CPUFLAGS_AVX512_T2) == IMB_CPUFLAGS_AVX512_T2) {
        init_mb_mgr_avx512(manager);
        if ((manager->features & WANTED) == WANTED && imb_get_errno(manager) == 0)
            return manager;
    }
    free_mb_mgr(manager);
    return NULL;
}

void retinue_imb_free(void *manager)
{
    free_mb_mgr(manager);
}

/* Seals or opens `length` bytes (1 or more; dst may be src) and writes the 16 bytes of the tag that belongs to them. A job
 * a call: submitting one of this algorithm returns it done. One manager a thread.
 * 1 when done; 0 when the library refused, and then dst means nothing. */
int retinue_imb_chacha20poly1305(void *manager, int opening, const uint8_t *key, const uint8_t *nonce, const uint8_t *ad,
                                 size_t ad_length, const uint8_t *src, uint8_t *dst, size_t length, uint8_t *tag)
{
    IMB_MGR *m = manager;
    IMB_JOB *job = IMB_GET_NEXT_JOB(m);

    job->cipher_direction = opening ? IMB_DIR_DECRYPT : IMB_DIR_ENCRYPT;
    job->chain_order = opening ? IMB_ORDER_HASH_CIPHER : IMB_ORDER_CIPHER_HASH;
    job->cipher_mode = IMB_CIPHER_CHACHA20_POLY1305;
    job->hash_alg = IMB_AUTH_CHACHA20_POLY1305;
    job->enc_keys = job->dec_keys = key;
    job->key_len_in_bytes = 32;
    job->iv = nonce;
    job->iv_len_in_bytes = 12;
    job->u.CHACHA20_POLY1305.aad = ad;
    job->u.CHACHA20_POLY1305.aad_len_in_bytes = ad_length;
    job->src = src;
    job->dst = dst;
    job->cipher_start_src_offset_in_bytes = job->hash_start_src_offset_in_bytes = 0;
    job->msg_len_to_cipher_in_bytes = job->msg_len_to_hash_in_bytes = length;
    job->auth_tag_output = tag;
    job->auth_tag_output_len_in_bytes = 16;
    job = IMB_SUBMIT_JOB_NOCHECK(m);
    if (job == NULL)
        job = IMB_FLUSH_JOB(m);
    return job != NULL && job->status == IMB_STATUS_COMPLETED;
}

/* What AES-256-GCM needs of a key of 32 bytes, or NULL without memory: round keys, and 48 powers of the hash key, which
 * others compute for every packet. */
void *retinue_imb_gcm_schedule(void *manager, const uint8_t *key)
{
    IMB_MGR *m = manager;
    struct gcm_key_data *schedule = NULL;

    if (posix_memalign((void **)&schedule, 64, sizeof *schedule) != 0)
        return NULL;
    memset(schedule, 0, sizeof *schedule);
    IMB_AES256_GCM_PRE(m, key, schedule);
    return schedule;
}

void retinue_imb_gcm_forget(void *schedule)
{
    explicit_bzero(schedule, sizeof(struct gcm_key_data));
    free(schedule);
}

/* Seals or opens `length` bytes (dst may be src), and writes the tag that belongs to them. Of the manager only the table of
 * functions is read, so that threads may share it. */
void retinue_imb_gcm(const void *manager, int opening, const void *schedule, const uint8_t *nonce, const uint8_t *ad,
                     size_t ad_length, const uint8_t *src, uint8_t *dst, size_t length, uint8_t *tag)
{
    const IMB_MGR *m = manager;
    struct gcm_context_data context;

    if (opening)
        IMB_AES256_GCM_DEC(m, schedule, &context, dst, src, length, nonce, ad, ad_length, tag, 16);
    else
        IMB_AES256_GCM_ENC(m, schedule, &context, dst, src, length, nonce, ad, ad_length, tag, 16);
    explicit_bzero(&context, sizeof context);
}
