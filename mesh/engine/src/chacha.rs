//! ChaCha20-Poly1305 (RFC 8439) with AVX-512 and IFMA, for transport packets: no associated data, a fresh nonce
//! each time. Packets of a tunnel are short, and the library's code for longer messages leaves half of such a CPU idle.
//!
//! ChaCha20 keeps four blocks in four registers, a row of their states in each, and up to six such sets at once: a
//! packet of 1,420 bytes, with the block its one-time key comes from, is one pass. Poly1305 works on sixteen blocks at
//! a time in radix 2^44. No branch and no address depends on a key or on data. Where the CPU lacks an instruction, or
//! the result is not AWS-LC's, `usable` says no and AWS-LC does the work.

use std::arch::x86_64::*;
use std::sync::OnceLock;

use crate::crypto::{Aead, Forged, Key, TAG_LEN};

/// Sets of four blocks in one pass.
const SETS: usize = 6;
const BLOCK: usize = 64;
/// Up to so many 16-byte blocks the vector code's powers of r cost more than they save.
const SCALAR_BLOCKS: usize = 16;
const MASK44: u64 = (1 << 44) - 1;
const MASK42: u64 = (1 << 42) - 1;

/// Whether this CPU can and the outcome is that of AWS-LC; found out once.
pub fn usable() -> bool {
    static USABLE: OnceLock<bool> = OnceLock::new();
    *USABLE.get_or_init(|| {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512ifma")
            && [0, 17, 100, 240, 256, 1420, 1552, 4000].into_iter().all(agrees)
    })
}

/// Whether a message of `len` bytes is sealed and opened as AWS-LC does it.
fn agrees(len: usize) -> bool {
    let key: Key = std::array::from_fn(|i| (i * 7 + len) as u8);
    let plain: Vec<u8> = (0..len).map(|i| (i * 13 + i / 256) as u8).collect();
    let theirs = Aead::library(&key);
    let counter = 0x0123_4567_89ab_cdef ^ len as u64;
    let (mut a, mut b) = (vec![0; len + TAG_LEN], vec![0; len + TAG_LEN]);
    theirs.seal(counter, &[], &plain, &mut a);
    // SAFETY: called by `usable` only, which has checked the CPU.
    unsafe { seal(&key, counter, &plain, &mut b) };
    // SAFETY: as above.
    a == b && unsafe { open(&key, counter, &mut b) } == Ok(len) && b[..len] == plain
}

/// Encrypts `plain` into `out`, which has TAG_LEN bytes more at least.
///
/// # Safety
/// The CPU must have what `usable` looks for.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512ifma")]
pub unsafe fn seal(key: &Key, counter: u64, plain: &[u8], out: &mut [u8]) {
    let len = plain.len();
    assert!(out.len() >= len + TAG_LEN);
    let mut stream = Stream { bytes: [0; SETS * 4 * BLOCK] };
    let start = State::new(key, counter);
    let mut made = pass(&start, 0, 1 + len.div_ceil(BLOCK), &mut stream);
    let one_time: [u8; 32] = stream.bytes[..32].try_into().expect("32 bytes");
    mix(&stream.bytes[BLOCK..], plain, out, 0, (made - 1) * BLOCK);
    while (made - 1) * BLOCK < len {
        let done = (made - 1) * BLOCK;
        let more = pass(&start, made as u32, (len - done).div_ceil(BLOCK), &mut stream);
        mix(&stream.bytes, plain, out, done, more * BLOCK);
        made += more;
    }
    let tag = poly1305(&one_time, &out[..len]);
    out[len..len + TAG_LEN].copy_from_slice(&tag);
}

/// Checks and decrypts `data` (ciphertext and tag) in place; forged data is left as it is.
///
/// # Safety
/// The CPU must have what `usable` looks for.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512ifma")]
pub unsafe fn open(key: &Key, counter: u64, data: &mut [u8]) -> Result<usize, Forged> {
    let Some(len) = data.len().checked_sub(TAG_LEN) else { return Err(Forged) };
    let mut stream = Stream { bytes: [0; SETS * 4 * BLOCK] };
    let start = State::new(key, counter);
    let mut made = pass(&start, 0, 1 + len.div_ceil(BLOCK), &mut stream);
    let one_time: [u8; 32] = stream.bytes[..32].try_into().expect("32 bytes");
    let tag = poly1305(&one_time, &data[..len]);
    let given: [u8; TAG_LEN] = data[len..].try_into().expect("a tag");
    if std::hint::black_box(u128::from_ne_bytes(tag) ^ u128::from_ne_bytes(given)) != 0 {
        return Err(Forged);
    }
    unmix(&stream.bytes[BLOCK..], &mut data[..len], 0, (made - 1) * BLOCK);
    while (made - 1) * BLOCK < len {
        let done = (made - 1) * BLOCK;
        let more = pass(&start, made as u32, (len - done).div_ceil(BLOCK), &mut stream);
        unmix(&stream.bytes, &mut data[..len], done, more * BLOCK);
        made += more;
    }
    Ok(len)
}

// ---- ChaCha20

#[repr(C, align(64))]
struct Stream {
    bytes: [u8; SETS * 4 * BLOCK],
}

/// The rows of the initial state, each four times, the block counter 0 to 3.
struct State {
    rows: [__m512i; 4],
}

impl State {
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn new(key: &Key, counter: u64) -> Self {
        let word = |at: usize| i32::from_le_bytes(key[at..at + 4].try_into().expect("4 bytes"));
        let (low, high) = (counter as i32, (counter >> 32) as i32);
        let row = |a, b, c, d| _mm512_broadcast_i32x4(_mm_set_epi32(d, c, b, a));
        let lanes = _mm512_set_epi32(0, 0, 0, 3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 0);
        Self {
            rows: [
                row(0x6170_7865, 0x3320_646e, 0x7962_2d32, 0x6b20_6574),
                row(word(0), word(4), word(8), word(12)),
                row(word(16), word(20), word(24), word(28)),
                _mm512_add_epi32(row(0, 0, low, high), lanes),
            ],
        }
    }
}

/// Key stream from block `first` on, at least one block, `wanted` or as many as fit; returns how many were made.
#[inline]
#[target_feature(enable = "avx512f")]
fn pass(start: &State, first: u32, wanted: usize, out: &mut Stream) -> usize {
    match wanted.div_ceil(4) {
        0 | 1 => blocks::<1>(start, first, out),
        2 => blocks::<2>(start, first, out),
        3 => blocks::<3>(start, first, out),
        4 => blocks::<4>(start, first, out),
        5 => blocks::<5>(start, first, out),
        _ => blocks::<SETS>(start, first, out),
    }
}

#[target_feature(enable = "avx512f")]
fn blocks<const N: usize>(start: &State, first: u32, out: &mut Stream) -> usize {
    let [a0, b0, c0, d0] = start.rows;
    let (mut a, mut b, mut c, mut d) = ([a0; N], [b0; N], [c0; N], [d0; N]);
    for (s, row) in d.iter_mut().enumerate() {
        *row = _mm512_add_epi32(d0, _mm512_maskz_set1_epi32(0x1111, (first + 4 * s as u32) as i32));
    }
    let counters = d;
    // All sets side by side: none waits for another.
    macro_rules! step {
        ($x:ident += $y:ident; $z:ident <<<= $n:literal) => {
            for s in 0..N {
                $x[s] = _mm512_add_epi32($x[s], $y[s]);
            }
            for s in 0..N {
                $z[s] = _mm512_xor_si512($z[s], $x[s]);
            }
            for s in 0..N {
                $z[s] = _mm512_rol_epi32::<$n>($z[s]);
            }
        };
    }
    macro_rules! round {
        () => {
            step!(a += b; d <<<= 16);
            step!(c += d; b <<<= 12);
            step!(a += b; d <<<= 8);
            step!(c += d; b <<<= 7);
        };
    }
    for _ in 0..10 {
        round!();
        for s in 0..N {
            b[s] = _mm512_shuffle_epi32::<0x39>(b[s]);
            c[s] = _mm512_shuffle_epi32::<0x4e>(c[s]);
            d[s] = _mm512_shuffle_epi32::<0x93>(d[s]);
        }
        round!();
        for s in 0..N {
            b[s] = _mm512_shuffle_epi32::<0x93>(b[s]);
            c[s] = _mm512_shuffle_epi32::<0x4e>(c[s]);
            d[s] = _mm512_shuffle_epi32::<0x39>(d[s]);
        }
    }
    for s in 0..N {
        let rows = [
            _mm512_add_epi32(a[s], a0),
            _mm512_add_epi32(b[s], b0),
            _mm512_add_epi32(c[s], c0),
            _mm512_add_epi32(d[s], counters[s]),
        ];
        // From a row of four blocks in each register to a block in each.
        let low =
            [_mm512_shuffle_i32x4::<0x44>(rows[0], rows[1]), _mm512_shuffle_i32x4::<0x44>(rows[2], rows[3])];
        let high =
            [_mm512_shuffle_i32x4::<0xee>(rows[0], rows[1]), _mm512_shuffle_i32x4::<0xee>(rows[2], rows[3])];
        let ordered = [
            _mm512_shuffle_i32x4::<0x88>(low[0], low[1]),
            _mm512_shuffle_i32x4::<0xdd>(low[0], low[1]),
            _mm512_shuffle_i32x4::<0x88>(high[0], high[1]),
            _mm512_shuffle_i32x4::<0xdd>(high[0], high[1]),
        ];
        for (i, block) in ordered.into_iter().enumerate() {
            let at = (4 * s + i) * BLOCK;
            // SAFETY: `out` has SETS * 4 blocks, N is at most SETS, and the stream is aligned to 64 bytes.
            unsafe { _mm512_store_si512(out.bytes[at..at + BLOCK].as_mut_ptr().cast(), block) };
        }
    }
    4 * N
}

/// Exclusive or of `from` and the key stream into `to`, from byte `at` on, at most `most` bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn mix(stream: &[u8], from: &[u8], to: &mut [u8], at: usize, most: usize) {
    let n = most.min(from.len() - at);
    let (stream, from, to) = (&stream[..n], &from[at..at + n], &mut to[at..at + n]);
    // SAFETY: three slices of n bytes; `to` is another one than `from`.
    unsafe { xor(stream.as_ptr(), from.as_ptr(), to.as_mut_ptr(), n) };
}

/// The same in place.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn unmix(stream: &[u8], data: &mut [u8], at: usize, most: usize) {
    let n = most.min(data.len() - at);
    let (stream, data) = (&stream[..n], &mut data[at..at + n]);
    // SAFETY: two slices of n bytes; every byte is read before it is written.
    unsafe { xor(stream.as_ptr(), data.as_ptr(), data.as_mut_ptr(), n) };
}

/// # Safety
/// `n` bytes must be readable at `stream` and `from` and writable at `to`, which is `from` or does not overlap it.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn xor(stream: *const u8, from: *const u8, to: *mut u8, n: usize) {
    let mut at = 0;
    // SAFETY: whole blocks first, then the bytes of the mask only, so nothing lies past n.
    unsafe {
        while at + BLOCK <= n {
            let x = _mm512_xor_si512(
                _mm512_loadu_si512(stream.add(at).cast()),
                _mm512_loadu_si512(from.add(at).cast()),
            );
            _mm512_storeu_si512(to.add(at).cast(), x);
            at += BLOCK;
        }
        if at < n {
            let mask = u64::MAX >> (BLOCK - (n - at));
            let x = _mm512_xor_si512(
                _mm512_maskz_loadu_epi8(mask, stream.add(at).cast()),
                _mm512_maskz_loadu_epi8(mask, from.add(at).cast()),
            );
            _mm512_mask_storeu_epi8(to.add(at).cast(), mask, x);
        }
    }
}

// ---- Poly1305

/// A number below 2^131 as 44 + 44 + 43 bits.
type Limbs = [u64; 3];

/// a * b modulo 2^130 - 5, up to a few multiples of it.
#[inline]
fn multiply(a: Limbs, b: Limbs) -> Limbs {
    let product = |x: u64, y: u64| u128::from(x) * u128::from(y);
    // 2^132 is 20.
    let (b1, b2) = (b[1] * 20, b[2] * 20);
    let d0 = product(a[0], b[0]) + product(a[1], b2) + product(a[2], b1);
    let d1 = product(a[0], b[1]) + product(a[1], b[0]) + product(a[2], b2);
    let d2 = product(a[0], b[2]) + product(a[1], b[1]) + product(a[2], b[0]);
    let d1 = d1 + (d0 >> 44);
    let d2 = d2 + (d1 >> 44);
    let low = (d0 as u64 & MASK44) + (d2 >> 42) as u64 * 5;
    [low & MASK44, (d1 as u64 & MASK44) + (low >> 44), d2 as u64 & MASK42]
}

#[inline]
fn add(a: Limbs, b: Limbs) -> Limbs {
    [a[0] + b[0], a[1] + b[1], a[2] + b[2]]
}

/// 16 bytes, and the bit above them that the standard adds.
#[inline]
fn limbs(block: [u8; 16], top: u64) -> Limbs {
    let x = u128::from_le_bytes(block);
    [x as u64 & MASK44, (x >> 44) as u64 & MASK44, (x >> 88) as u64 | top << 40]
}

/// The tag of ciphertext `data` without associated data (RFC 8439, 2.8).
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512ifma")]
fn poly1305(key: &[u8; 32], data: &[u8]) -> [u8; TAG_LEN] {
    const CLAMP: u128 = 0x0fff_fffc_0fff_fffc_0fff_fffc_0fff_ffff;
    let half = |at: usize| u128::from_le_bytes(key[at..at + 16].try_into().expect("16 bytes"));
    let r = limbs((half(0) & CLAMP).to_le_bytes(), 0);
    let blocks = data.len().div_ceil(16) + 1;
    let sum = if blocks <= SCALAR_BLOCKS { few(r, data) } else { many(r, data, blocks) };
    finish(sum, half(16))
}

/// Block by block.
#[inline]
fn few(r: Limbs, data: &[u8]) -> Limbs {
    let mut h = [0; 3];
    for part in data.chunks(16) {
        let mut block = [0; 16];
        block[..part.len()].copy_from_slice(part);
        h = multiply(add(h, limbs(block, 1)), r);
    }
    multiply(add(h, limbs(lengths(data), 1)), r)
}

/// The last block: lengths of the associated data, none, and of the ciphertext.
fn lengths(data: &[u8]) -> [u8; 16] {
    ((data.len() as u128) << 64).to_le_bytes()
}

/// Full reduction and the second half of the key.
fn finish(h: Limbs, pad: u128) -> [u8; TAG_LEN] {
    let mut h = h;
    for _ in 0..2 {
        h = [h[0], h[1] + (h[0] >> 44), h[2]];
        h = [h[0] & MASK44, h[1] & MASK44, h[2] + (h[1] >> 44)];
        h = [h[0] + (h[2] >> 42) * 5, h[1], h[2] & MASK42];
    }
    h = [h[0] & MASK44, h[1] + (h[0] >> 44), h[2]];
    h = [h[0], h[1] & MASK44, h[2] + (h[1] >> 44)];
    // h - p = h + 5 - 2^130, taken when it is not negative.
    let g0 = h[0] + 5;
    let g1 = h[1] + (g0 >> 44);
    let g2 = (h[2] + (g1 >> 44)).wrapping_sub(1 << 42);
    let keep = (g2 >> 63).wrapping_neg();
    let pick = |h: u64, g: u64| u128::from((h & keep) | (g & !keep));
    let low = pick(h[0], g0 & MASK44);
    let middle = pick(h[1], g1 & MASK44);
    let high = pick(h[2], g2);
    (low | middle << 44 | high << 88).wrapping_add(pad).to_le_bytes()
}

/// Eight numbers, side by side.
type Wide = [__m512i; 3];

/// Which block of a group of eight is in each lane, after `split`.
const ORDER: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// Sixteen blocks at a time: two sums of eight lanes each, all multiplied by r^16; the powers that the lanes
/// lack come at the end. Missing blocks are thought in front, where they count nothing.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512ifma")]
fn many(r: Limbs, data: &[u8], blocks: usize) -> Limbs {
    let r2 = multiply(r, r);
    let r4 = multiply(r2, r2);
    let r8 = multiply(r4, r4);
    let r16 = multiply(r8, r8);
    let step = spread(r16);
    let missing = (16 - blocks % 16) % 16;
    let top = |from: usize| {
        let mut mask = 0u8;
        for (lane, block) in ORDER.into_iter().enumerate() {
            mask |= u8::from(block + from >= missing) << lane;
        }
        _mm512_maskz_set1_epi64(mask, 1 << 40)
    };
    let start = data.as_ptr().wrapping_sub(16 * missing);
    let mut first = [_mm512_setzero_si512(); 4];
    for (i, four) in first.iter_mut().enumerate() {
        let mask = (0xffu32 << (2 * missing.saturating_sub(4 * i).min(4))) as u8;
        // SAFETY: the mask leaves out what lies in front of `data`; there are more than 16 - missing blocks of it.
        *four = unsafe { _mm512_maskz_loadu_epi64(mask, start.wrapping_add(64 * i).cast()) };
    }
    let mut x = split(first[0], first[1], top(0));
    let mut y = split(first[2], first[3], top(8));
    let full = _mm512_set1_epi64(1 << 40);
    let groups = (blocks + missing) / 16;
    for group in 1..groups {
        let at = 256 * group - 16 * missing;
        let last = if group + 1 == groups { data.len() - (at + 192) } else { BLOCK };
        // SAFETY: all groups but the last are whole; of that the first three loads are, too, for it has 16 blocks of
        // which the last is the lengths; the fourth is masked to what `data` has.
        let m: [__m512i; 4] = unsafe {
            let p = data.as_ptr().add(at);
            [
                _mm512_loadu_si512(p.cast()),
                _mm512_loadu_si512(p.add(64).cast()),
                _mm512_loadu_si512(p.add(128).cast()),
                _mm512_maskz_loadu_epi8(u64::MAX >> (BLOCK - last), p.add(192).cast()),
            ]
        };
        let fourth = if group + 1 == groups {
            _mm512_or_si512(m[3], _mm512_maskz_set1_epi64(0x80, data.len() as i64))
        } else {
            m[3]
        };
        x = plus(times(x, step), split(m[0], m[1], full));
        y = plus(times(y, step), split(m[2], fourth, full));
    }
    // Powers 8 to 1 for the lanes, in their order; the first sum lacks eight more.
    let r3 = multiply(r2, r);
    let by_block = [r8, multiply(r4, r3), multiply(r4, r2), multiply(r4, r), r4, r3, r2, r];
    let mut rest = [[0u64; 8]; 3];
    for (lane, block) in ORDER.into_iter().enumerate() {
        for limb in 0..3 {
            rest[limb][lane] = by_block[block][limb];
        }
    }
    // SAFETY: each row has 64 bytes.
    let rest: Wide = unsafe {
        [
            _mm512_loadu_si512(rest[0].as_ptr().cast()),
            _mm512_loadu_si512(rest[1].as_ptr().cast()),
            _mm512_loadu_si512(rest[2].as_ptr().cast()),
        ]
    };
    let sum = times(plus(times(x, spread(r8)), y), rest);
    let total = |limb| _mm512_reduce_add_epi64(limb) as u64;
    [total(sum[0]), total(sum[1]), total(sum[2])]
}

/// The same number in every lane.
#[inline]
#[target_feature(enable = "avx512f")]
fn spread(x: Limbs) -> Wide {
    [_mm512_set1_epi64(x[0] as i64), _mm512_set1_epi64(x[1] as i64), _mm512_set1_epi64(x[2] as i64)]
}

/// Eight blocks as limbs, `top` on the last one.
#[inline]
#[target_feature(enable = "avx512f")]
fn split(a: __m512i, b: __m512i, top: __m512i) -> Wide {
    let (low, high) = (_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    let mask = _mm512_set1_epi64(MASK44 as i64);
    let middle = _mm512_or_si512(_mm512_srli_epi64::<44>(low), _mm512_slli_epi64::<20>(high));
    [
        _mm512_and_si512(low, mask),
        _mm512_and_si512(middle, mask),
        _mm512_or_si512(_mm512_srli_epi64::<24>(high), top),
    ]
}

#[inline]
#[target_feature(enable = "avx512f")]
fn plus(a: Wide, b: Wide) -> Wide {
    [_mm512_add_epi64(a[0], b[0]), _mm512_add_epi64(a[1], b[1]), _mm512_add_epi64(a[2], b[2])]
}

/// a * b in each lane. The low 52 bits of a product stay at its limb; the rest is 2^8 of the next one.
#[inline]
#[target_feature(enable = "avx512f,avx512ifma")]
fn times(a: Wide, b: Wide) -> Wide {
    let zero = _mm512_setzero_si512();
    let twenty = |x| _mm512_add_epi64(_mm512_slli_epi64::<4>(x), _mm512_slli_epi64::<2>(x));
    let (b1, b2) = (twenty(b[1]), twenty(b[2]));
    let low = |x, y, z| _mm512_madd52lo_epu64(z, x, y);
    let high = |x, y, z| _mm512_madd52hi_epu64(z, x, y);
    // The factor that has been ready longest goes first.
    let l0 = low(a[2], b1, low(a[1], b2, low(a[0], b[0], zero)));
    let h0 = high(a[2], b1, high(a[1], b2, high(a[0], b[0], zero)));
    let l1 = low(a[2], b2, low(a[1], b[0], low(a[0], b[1], zero)));
    let h1 = high(a[2], b2, high(a[1], b[0], high(a[0], b[1], zero)));
    let l2 = low(a[2], b[0], low(a[1], b[1], low(a[0], b[2], zero)));
    let h2 = high(a[2], b[0], high(a[1], b[1], high(a[0], b[2], zero)));
    let mask = _mm512_set1_epi64(MASK44 as i64);
    // 20 * 2^8 of the limb above the last.
    let wrapped = _mm512_add_epi64(_mm512_slli_epi64::<12>(h2), _mm512_slli_epi64::<10>(h2));
    let d0 = _mm512_add_epi64(l0, wrapped);
    let d1 = _mm512_add_epi64(_mm512_add_epi64(l1, _mm512_slli_epi64::<8>(h0)), _mm512_srli_epi64::<44>(d0));
    let d2 = _mm512_add_epi64(_mm512_add_epi64(l2, _mm512_slli_epi64::<8>(h1)), _mm512_srli_epi64::<44>(d1));
    let carry = _mm512_srli_epi64::<42>(d2);
    let five = _mm512_add_epi64(carry, _mm512_slli_epi64::<2>(carry));
    [
        _mm512_add_epi64(_mm512_and_si512(d0, mask), five),
        _mm512_and_si512(d1, mask),
        _mm512_and_si512(d2, _mm512_set1_epi64(MASK42 as i64)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_is_as_the_library_has_it() {
        if !usable() {
            return;
        }
        assert!((0..2200).chain([4096, 9000, 65_519]).all(agrees));
    }

    #[test]
    fn forged_data_is_refused_and_left_alone() {
        if !usable() {
            return;
        }
        let key = [9; 32];
        for len in [0, 1, 64, 239, 240, 241, 1420, 3000] {
            let mut sealed = vec![0; len + TAG_LEN];
            // SAFETY: the CPU was just looked at.
            unsafe { seal(&key, 7, &vec![3; len], &mut sealed) };
            for bit in [0, 8 * len / 2, 8 * len, 8 * len + 127] {
                let mut bad = sealed.clone();
                bad[bit / 8] ^= 1 << (bit % 8);
                let before = bad.clone();
                // SAFETY: as above.
                assert_eq!(unsafe { open(&key, 7, &mut bad) }, Err(Forged), "{len} {bit}");
                assert_eq!(bad, before);
            }
            // SAFETY: as above.
            assert_eq!(unsafe { open(&key, 8, &mut sealed.clone()) }, Err(Forged), "another nonce");
            // SAFETY: as above.
            assert_eq!(unsafe { open(&key, 7, &mut sealed) }, Ok(len));
        }
        // SAFETY: as above.
        assert_eq!(unsafe { open(&key, 7, &mut [0; 15]) }, Err(Forged), "too short for a tag");
    }

    /// Sums that only a complete reduction gets right: key and data at their extremes.
    #[test]
    fn reductions_at_the_edge() {
        if !usable() {
            return;
        }
        for (r, s) in [(u128::MAX, u128::MAX), (u128::MAX, 0), (0, u128::MAX), (2, 0), (1 << 2, u128::MAX)] {
            let mut key = [0; 32];
            key[..16].copy_from_slice(&r.to_le_bytes());
            key[16..].copy_from_slice(&s.to_le_bytes());
            for len in [0, 16, 32, 240, 256, 272, 1008, 1420, 1536] {
                for fill in [0xff, 0xfe, 0xfb, 0, 1] {
                    let data = vec![fill; len];
                    // SAFETY: the CPU was just looked at.
                    let tag = unsafe { poly1305(&key, &data) };
                    assert_eq!(tag, slowly(&key, &data), "{r:x} {s:x} {len} {fill}");
                }
            }
        }
    }

    /// Poly1305 of the padded message with numbers as schools teach them, 32-bit digits.
    fn slowly(key: &[u8; 32], data: &[u8]) -> [u8; 16] {
        let clamp = 0x0fff_fffc_0fff_fffc_0fff_fffc_0fff_ffff_u128;
        let half = |at: usize| u128::from_le_bytes(key[at..at + 16].try_into().unwrap());
        let digits = |x: u128| [0, 32, 64, 96].map(|n| (x >> n) as u32 as u64);
        let r = digits(half(0) & clamp);
        let mut h = [0u64; 5];
        let mut message = data.to_vec();
        message.resize(data.len().next_multiple_of(16), 0);
        message.extend_from_slice(&lengths(data));
        for block in message.chunks(16) {
            let m = digits(u128::from_le_bytes(block.try_into().unwrap()));
            let mut carry = 0;
            for i in 0..5 {
                let x = h[i] + if i < 4 { m[i] } else { 1 } + carry;
                (h[i], carry) = (x & 0xffff_ffff, x >> 32);
            }
            let mut wide = [0u64; 10];
            for i in 0..5 {
                let mut carry = 0;
                for j in 0..4 {
                    let x = wide[i + j] + h[i] * r[j] + carry;
                    (wide[i + j], carry) = (x & 0xffff_ffff, x >> 32);
                }
                wide[i + 4] += carry;
            }
            reduce(&mut wide);
            h.copy_from_slice(&wide[..5]);
        }
        let value = |h: &[u64; 5]| {
            u128::from(h[0]) | u128::from(h[1]) << 32 | u128::from(h[2]) << 64 | u128::from(h[3]) << 96
        };
        // Below 2^130 now, so p fits in once at most.
        let at_least_p = h[4] == 3 && h[1..4].iter().all(|d| *d == 0xffff_ffff) && h[0] >= 0xffff_fffb;
        let low = if at_least_p { u128::from(h[0] - 0xffff_fffb) } else { value(&h) };
        low.wrapping_add(half(16)).to_le_bytes()
    }

    /// Until it is below 2^130: what is above counts five times.
    fn reduce(wide: &mut [u64; 10]) {
        while wide[5..].iter().any(|d| *d != 0) || wide[4] > 3 {
            let mut above = [0u64; 6];
            for i in 0..6 {
                let high = if i < 5 { wide[i + 5] } else { 0 };
                above[i] = (wide[i + 4] >> 2) | (high << 30 & 0xffff_ffff);
            }
            wide[4] &= 3;
            wide[5..].fill(0);
            let mut carry = 0;
            for i in 0..10 {
                let x = wide[i] + if i < 6 { above[i] * 5 } else { 0 } + carry;
                (wide[i], carry) = (x & 0xffff_ffff, x >> 32);
            }
        }
    }
}
